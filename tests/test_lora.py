"""LoRA on a dense model: the function at the start, the merged weights, what moves, and exact resume."""
import copy
import pytest
import torch

import toy_phase_a
from nanochat_cl import evolve, lora, phase_b, runs

RANK = 4


def model_of(seed: int = 3):
    from nanochat import gpt
    torch.manual_seed(seed)
    model = gpt.GPT(gpt.GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=64))
    model.init_weights()
    with torch.no_grad():
        for p in model.parameters():  # nanochat begins with zeros in places, and a zero hides mistakes
            p.add_(0.05 * torch.randn_like(p, dtype=torch.float32))
    return model


def batch():
    tokens = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def trained(steps: int = 3):
    torch.compiler.set_stance("force_eager")
    model = model_of()
    plain = copy.deepcopy(model)
    optimizer = lora.adapt(model, RANK, seed=7)
    for _ in range(steps):
        model(*batch()).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
    return plain, model


def test_before_the_first_step_the_function_is_phase_a_s_to_the_bit():
    plain, model = trained(steps=0)
    plain.requires_grad_(False)  # torch has another kernel where a weight needs a gradient
    assert torch.equal(plain(batch()[0]), model(batch()[0]))
    assert {name for name, _ in plain.named_parameters()} < {name for name, _ in model.named_parameters()}, "names of Phase A's weights changed"


def test_only_adapters_move_and_the_loss_falls():
    plain, model = trained(steps=8)
    before, adapters = dict(plain.named_parameters()), 0
    for name, p in model.named_parameters():
        if name in before:
            assert torch.equal(p, before[name]), name
        else:
            assert name.endswith(("lora_a", "lora_b")) and p.any(), name
            adapters += p.numel()
    # four (64, 64) matrices of attention, (256, 64) and (64, 256) of the MLP, per layer
    assert adapters == 2 * RANK * (4 * (64 + 64) + 2 * (64 + 256))
    with torch.no_grad():
        assert model(*batch()) < plain(*batch()) - 0.01


def test_merged_weights_are_the_adapted_function():
    plain, model = trained()
    with torch.no_grad():
        plain.load_state_dict(lora.merged(model, model.state_dict()), strict=True)
        assert (plain.transformer.h[0].mlp.c_fc.weight - model.transformer.h[0].mlp.c_fc.weight).abs().max() > 1e-4, "nothing was folded in"
        assert torch.allclose(plain(batch()[0]), model(batch()[0]), atol=1e-4)


def test_another_seed_begins_with_other_adapters_and_the_same_one_with_the_same():
    a, b, c = (model_of() for _ in range(3))
    for model, seed in ((a, 1), (b, 1), (c, 2)):
        lora.adapt(model, RANK, seed)
    first = [model.transformer.h[0].attn.c_q.lora_a for model in (a, b, c)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_a_compiled_adapted_model_is_the_eager_one():
    torch.compiler.set_stance("default")
    model = model_of()
    lora.adapt(model, RANK, seed=7)
    compiled = torch.compile(model, backend="aot_eager", dynamic=False, fullgraph=True)
    loss = compiled(*batch())
    loss.backward()
    got = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad(set_to_none=True)
    model(*batch()).backward()
    assert len(got) == 24
    for there, p in zip(got, (p for p in model.parameters() if p.requires_grad)):
        assert torch.allclose(there, p.grad, atol=1e-5)


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    torch.compiler.set_stance("force_eager")
    yield toy_phase_a.make(tmp_path, names=("dense",))
    torch.compiler.set_stance("default")


def test_the_arm_learns_freezes_phase_a_and_continues_from_a_state_to_the_same_records(base, monkeypatch):
    def run(name: str, stop_after: int | None = None):
        args = evolve.parse([*toy_phase_a.ARGS, "--name", name, "--arms", "dense,dense-lora", "--max-tokens", "1536"])
        if stop_after is not None:
            before = phase_b.PhaseB.train

            def train(self):
                if self.state["step"] == stop_after:
                    raise KeyboardInterrupt
                before(self)
            with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
                m.setattr(phase_b.PhaseB, "train", train)
                evolve.evolve(args)
        evolve.evolve(args)
        return toy_phase_a.comparable(base, name)
    whole = run("whole")
    assert whole == run("stopped", stop_after=3)
    mine = [r for r in whole if r["arm"] == "dense-lora"]
    assert mine[0]["domain"]["val"]["bpb"] == pytest.approx(whole[0]["domain"]["val"]["bpb"], abs=1e-5)
    assert mine[-1]["domain"]["val"]["bpb"] < mine[0]["domain"]["val"]["bpb"]
    start = torch.load(base / "base_checkpoints/d2_dense_s42/model_000003.pt", weights_only=True)
    state = runs.load_state(base / "evolve/whole", torch.device("cpu"))["arms"]["dense-lora"]["model"]
    assert all(torch.equal(state[key], value) for key, value in start.items()) and len(state) == len(start) + 24
