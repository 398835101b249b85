"""
Compare the trained tokenizer with those of GPT-2 and GPT-4 by compression: bytes per token on several kinds of text.

python -m scripts.tok_eval

The two published tokenizers are fetched by tiktoken the first time; without a network their tables are left out.
"""
import requests

from nanochat.command import run
from nanochat.dataset import parquets_iter_batched
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer

NEWS = """
The city council voted 7 to 2 on Tuesday evening to close the riverside road to cars for the summer, after three months of
public hearings. Shop owners had warned of falling sales; a study by the university found the opposite in 14 comparable towns.
"It is an experiment, and we will measure it," the deputy mayor said. The new rules take effect on June 1, 2025.
"""

KOREAN = """
도서관은 오늘 아침 아홉 시에 문을 열었다. 아이들은 창가 자리에 앉아 그림책을 읽었고, 어른들은 조용히 신문을 넘겼다.
점심때가 되자 비가 내리기 시작했지만 아무도 서두르지 않았다.
"""

CODE = '''
def primes_below(limit: int) -> list[int]:
    """The sieve of Eratosthenes."""
    is_prime = [False, False] + [True] * (limit - 2)
    for n in range(2, int(limit ** 0.5) + 1):
        if is_prime[n]:
            for multiple in range(n * n, limit, n):
                is_prime[multiple] = False
    return [n for n, prime in enumerate(is_prime) if prime]
'''

MATH = r"""
Let $f : [a, b] \to \mathbb{R}$ be continuous. Then there is a $\xi \in (a, b)$ such that
\begin{equation}
  \int_a^b f(x)\,dx = f(\xi)\,(b - a), \qquad \sum_{k=0}^{\infty} \frac{x^k}{k!} = e^x .
\end{equation}
"""

SCIENCE = """
Mitochondria convert the energy of nutrients into adenosine triphosphate. Electrons pass along a chain of protein complexes in
the inner membrane, protons are pumped across it, and their return through ATP synthase drives the phosphorylation of ADP.
"""


def texts() -> dict[str, str]:
    named = {"news": NEWS, "korean": KOREAN, "code": CODE, "math": MATH, "science": SCIENCE}
    for split in ("train", "val"):
        documents = next(parquets_iter_batched(split), [])
        if documents:
            named[f"climbmix-{split}"] = "\n".join(documents)
    return named


def compression(tokenizer: RustBPETokenizer, text: str) -> dict:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text, "the tokenizer does not give back the text it encoded"
    num_bytes = len(text.encode("utf-8"))
    return {"bytes": num_bytes, "tokens": len(ids), "ratio": num_bytes / len(ids)}


def comparison_table(name: str, theirs: dict[str, dict], ours: dict[str, dict]) -> str:
    green, reset, rule = "\033[92m", "\033[0m", "=" * 95
    lines = [f"Comparison with {name}:", rule,
             f"{'Text type':<16}{'Bytes':>10}{name + ' tokens':>18}{'Ratio':>8}{'Ours tokens':>14}{'Ratio':>8}{'Relative':>12}"
             f"{'Better':>9}",
             "-" * 95]
    for kind, base in theirs.items():
        our = ours[kind]
        relative = 100 * (base["tokens"] - our["tokens"]) / base["tokens"]
        better = "equal" if relative == 0 else f"{green}{'Ours' if relative > 0 else name:>9}{reset}"
        lines.append(f"{kind:<16}{base['bytes']:>10}{base['tokens']:>18}{base['ratio']:>8.2f}{our['tokens']:>14}{our['ratio']:>8.2f}"
                     f"{relative:>+11.1f}%{better:>9}")
    return "\n".join([*lines, rule])


def main() -> None:
    named = texts()
    tokenizers = {}
    for name, tiktoken_name in [("GPT-2", "gpt2"), ("GPT-4", "cl100k_base")]:
        try:
            tokenizers[name] = RustBPETokenizer.from_pretrained(tiktoken_name)
        except requests.RequestException as e:
            print(f"{name}'s tokenizer could not be fetched ({type(e).__name__}): its table is left out")
    tokenizers["Ours"] = get_tokenizer()
    results = {name: {kind: compression(tokenizer, text) for kind, text in named.items()} for name, tokenizer in tokenizers.items()}

    print("Vocabulary sizes:")
    for name, tokenizer in tokenizers.items():
        print(f"{name}: {tokenizer.get_vocab_size():,}")
    ours = results.pop("Ours")
    for name, theirs in results.items():
        print(comparison_table(name, theirs, ours))
    if not results:
        for kind, our in ours.items():
            print(f"{kind:<16}{our['bytes']:>10} bytes {our['tokens']:>10} tokens {our['ratio']:>8.2f} bytes/token")


if __name__ == "__main__":
    run(main)
