"""
Put the patches of patches/ onto the nanochat tree, take them off again, show them, and prove what they leave alone.

python -m nanochat_cl.patching list                       # every patch: its target and its purpose
python -m nanochat_cl.patching verify [--upstream DIR]    # targets, signatures, undo, Model-CL, dense bit for bit; exit 1 on a failure
python -m nanochat_cl.patching diff [--upstream DIR]      # the difference to upstream, one hunk per patch
"""
import argparse
import dataclasses
import functools
import importlib
import inspect
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import patches
from nanochat_cl import command, upstream

HEADER = re.compile(r"^(Target|Why|Keeps|Verified):\s*(.*?)(?=^(?:Target|Why|Keeps|Verified):|\Z)", re.MULTILINE | re.DOTALL)


class Patch(NamedTuple):
    name: str
    target: str                 # module:qualname
    why: str
    wrap: Callable[[Any], Any]  # original -> what takes its place
    signature: tuple[str, ...]  # the parameters that the original (of a class: its __init__) is expected to have

    def find(self) -> tuple[Any, str, Any]:
        """(module or class that holds the target, its name there, the target); UserError when the tree has no such thing."""
        module, _, qualname = self.target.partition(":")
        *path, name = qualname.split(".")
        try:
            holder = importlib.import_module(module)
            for part in path:
                holder = vars(holder)[part]
            return holder, name, vars(holder)[name]
        except (ImportError, KeyError) as e:
            raise command.UserError(f"patch {self.name}: the nanochat tree {upstream.tree()} has no {self.target} ({e}); "
                                    f"see python -m nanochat_cl.patching verify") from e


class Applied(NamedTuple):
    patch: Patch
    holder: Any
    name: str
    original: Any
    replacement: Any


_applied: list[Applied] = []  # what is on, in order: undoing trusts this record and nothing that others may have rewrapped


def load() -> list[Patch]:
    found = []
    for name in patches.ORDER:
        module = importlib.import_module(f"patches.{name}")
        header = {key: " ".join(value.split()) for key, value in HEADER.findall(module.__doc__)}
        found.append(Patch(name, header["Target"], header["Why"], module.wrap, module.SIGNATURE))
    return found


def _rebind(before: Any, after: Any) -> None:
    """The names that modules copied by `from x import y`, whenever they were imported."""
    for module_name, module in list(sys.modules.items()):
        if module_name.split(".")[0] in ("nanochat", "scripts", "nanochat_cl"):
            for name in [name for name, value in vars(module).items() if value is before]:
                setattr(module, name, after)


def apply(wanted: Sequence[Patch] | None = None) -> None:
    """Apply in order whatever is not on yet."""
    for patch in load() if wanted is None else wanted:
        if patch.name not in [on.patch.name for on in _applied]:
            holder, name, original = patch.find()
            replacement = patch.wrap(original)
            if inspect.isfunction(original):
                functools.update_wrapper(replacement, original)
            _applied.append(Applied(patch, holder, name, original, replacement))
            setattr(holder, name, replacement)
            _rebind(original, replacement)


@contextmanager
def applied(wanted: Sequence[Patch] | None = None) -> Iterator[list[Applied]]:
    """Patched for the length of a block. What was on before stays on; where a target is missing nothing comes on."""
    before = len(_applied)
    try:
        apply(wanted)
        yield list(_applied)
    finally:
        while len(_applied) > before:
            last = _applied.pop()
            setattr(last.holder, last.name, last.original)
            _rebind(last.replacement, last.original)


def snapshot() -> dict[str, Any]:
    """Every attribute of nanochat's modules and of the classes in them, by its full name."""
    seen = {}
    for module_name in [name for name in sys.modules if name.split(".")[0] in ("nanochat", "scripts")]:
        for name, value in vars(sys.modules[module_name]).items():
            seen[f"{module_name}:{name}"] = value
            if isinstance(value, type) and value.__module__ == module_name:
                seen |= {f"{module_name}:{name}.{key}": member for key, member in vars(value).items()}
    return seen


def differing(a: dict[str, Any], b: dict[str, Any], same: Callable[[Any, Any], bool]) -> list[str]:
    return sorted(name for name in {*a, *b} if name not in a or name not in b or not same(a[name], b[name]))


def same_bits(a: Any, b: Any) -> bool:
    import torch
    return a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def train_dense() -> dict[str, Any]:
    """
    A tiny plain model set up, trained for three steps and decoded with a cache, through every public name that a patch may change:
    all tensors of model, optimizer state and output, and the numbers that upstream derives from the config, by name.
    """
    import torch
    common, dataset, gpt, engine = (importlib.import_module(f"nanochat.{name}") for name in ("common", "dataset", "gpt", "engine"))
    device = common.compute_init("cpu")[-1]
    config = gpt.GPTConfig(sequence_len=32, vocab_size=100, n_layer=2, n_head=2, n_kv_head=2, n_embd=64, window_pattern="SL")
    with torch.device("meta"):
        model = gpt.GPT(config)
    model.to_empty(device=device)
    model.init_weights()
    optimizer = model.setup_optimizer(weight_decay=0.1)
    out = {"config": dataclasses.asdict(config), "counts": model.num_scaling_params(), "flops": model.estimate_flops(),
           "shards": dataset.list_parquet_files(str(upstream.REPO)), "groups": optimizer.state_dict()["param_groups"]}
    for step in range(3):
        idx = torch.randint(config.vocab_size, (4, 33))
        out[f"loss {step}"] = model(idx[:, :-1].contiguous(), idx[:, 1:].contiguous())
        out[f"loss {step}"].backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)
    cache = engine.KVCache(batch_size=1, num_heads=2, seq_len=16, head_dim=32, num_layers=2, device=device, dtype=common.COMPUTE_DTYPE)
    with torch.no_grad():
        out |= {"prefill": model(idx[:1, :8], kv_cache=cache), "decode": model(idx[:1, 8:9], kv_cache=cache)}
    out |= {f"model {key}": value for key, value in model.state_dict().items()}
    return out | {f"optimizer {p} {key}": value for p, state in optimizer.state_dict()["state"].items() for key, value in state.items()}


def check(patch: Patch) -> str:
    """What the tree in use has for a patch: "ok", or what is wrong."""
    try:
        original = patch.find()[-1]
    except command.UserError as e:
        return f"MISSING {e.__cause__}"
    found = tuple(inspect.signature(original.__init__ if isinstance(original, type) else original).parameters)
    return "ok" if found == patch.signature else f"SIGNATURE IS ({', '.join(found)})"


def verify() -> bool:
    """Check the tree in use and print one table; False when anything failed. On a CPU, eagerly: it needs no compiler."""
    os.environ |= {"TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    wanted = load()
    results = {f"{patch.name:<14} {patch.target}": check(patch) for patch in wanted}
    if any(result.startswith("MISSING") for result in results.values()):
        results["dense bit for bit"] = "NOT RUN, targets are missing"
    else:
        logging.disable(logging.INFO)
        with redirect_stdout(io.StringIO()):
            for holder_of_copies in ("checkpoint_manager", "dataloader", "engine"):
                importlib.import_module(f"nanochat.{holder_of_copies}")
            plain = train_dense()
            before = snapshot()  # only now: torch rewraps the step of an optimizer's class when the first one is made
            with applied(wanted):
                wrong = differing(plain, train_dense(), same_bits)
                from nanochat_cl import arms
                from patches import settings
                with settings.using(arm=arms.cl(64, 2, 0, "cl")):  # the same program makes, trains and decodes a Model-CL
                    try:
                        sparse = f"ok, loss {train_dense()['loss 2']:.2f}"
                    except Exception as e:  # whatever another tree does otherwise
                        sparse = f"FAILS {' '.join(repr(e).split())[:200]}"
            left = differing(before, snapshot(), lambda a, b: a is b)
        results["no trace after undo"] = f"LEFT {', '.join(left)}" if left else f"ok, {len(before):,} names"
        results["Model-CL trains and decodes"] = sparse
        results["dense bit for bit"] = f"DIFFERS IN {', '.join(wrong)}" if wrong else f"ok, {len(plain)} values after 3 steps"
    print(f"nanochat tree {upstream.tree()} ({upstream.tree_hash()[:12]})")
    print("\n".join(f"{what:<56} {result}" for what, result in results.items()))
    return all(result.startswith("ok") for result in results.values())


def hunk(on: Applied) -> str:
    """One patch as a hunk of a diff: the target's source goes, the patch's `wrap` comes."""
    def source(thing: Any, root: Path) -> tuple[str, list[str]]:
        lines, first = inspect.getsourcelines(thing)
        return f"{os.path.relpath(inspect.getsourcefile(thing), root)}:{first}", [line.rstrip("\n") for line in lines]
    (old_place, old), (new_place, new) = source(inspect.unwrap(on.original), upstream.tree()), source(on.patch.wrap, upstream.REPO)
    old = old[:2] if isinstance(on.original, type) else old  # a class is kept, as a base
    return "\n".join([f"# {on.patch.name}: {on.patch.why}", f"--- {old_place} {on.patch.target}", f"+++ {new_place}",
                      *(f"-{line}" for line in old), *(f"+{line}" for line in new)])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nanochat_cl.patching", description="The changes to upstream")
    parser.add_argument("command", choices=["list", "verify", "diff"])
    parser.add_argument("--upstream", metavar="DIR", help="another nanochat tree (default: NANOCHAT_CL_UPSTREAM, else upstream/)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.upstream:  # before anything of nanochat is imported
        os.environ["NANOCHAT_CL_UPSTREAM"] = args.upstream
        upstream.activate()
    if args.command == "list":
        print("\n".join(f"{patch.name:<14} {patch.target:<40} {patch.why}" for patch in load()))
    elif args.command == "diff":
        with applied() as on:
            print("\n\n".join(map(hunk, on)))
    elif not verify():
        sys.exit(1)


if __name__ == "__main__":
    command.run(main)
