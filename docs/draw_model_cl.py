"""
Draws docs/model-cl.png: what a row of text goes through in Model-CL. Sizes are those of the code.

python docs/draw_model_cl.py
"""
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

import nanochat_cl  # noqa: F401  puts upstream/ on the path
from nanochat_cl import arms
from nanochat_cl.accounting import boundaries

INK, RED, GREY, PALE = "#1f2933", "#b3361b", "#7b8794", "#e4e7eb"
T, WIDTH, HEADS = 1024, 512, 8
ROWS = [("chunk 0: constant choice", 0, (0, 3, 5, 9), (0, 2, 4)), ("chunk at 256", 256, (1, 2, 7, 12), (1, 2, 5)),
        ("chunk at 512", 512, (1, 7, 8, 12), (1, 3, 5))]  # name, start, chosen routed blocks and heads: made up


def box(ax, x, y, width, height, face="white", edge=INK, text="", size=8, **more):
    ax.add_patch(Rectangle((x, y), width, height, fc=face, ec=edge, lw=0.8, **more))
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(ax, start, end, color=INK):
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, lw=1, color=color, shrinkA=0, shrinkB=0))


def draw() -> Figure:
    cl = arms.cl(WIDTH, HEADS, 0, "cl")
    shared, blocks, heads = cl["shared"], cl["blocks"], cl["shared_heads"]
    fig = Figure((10, 6.4))
    ax = fig.add_axes((0.01, 0.01, 0.98, 0.98))
    ax.set(xlim=(0, 100), ylim=(0, 64))
    ax.axis("off")

    ax.text(1, 61, "1  A row of text is cut into chunks, short ones first", fontsize=10, weight="bold", color=INK)
    starts = boundaries(T, cl["chunk"])
    place = lambda t: 2 + 96 * t / T
    for a, b in zip(starts, [*starts[1:], T]):
        box(ax, place(a), 54, place(b) - place(a), 4, face="white" if a else PALE)
    for t in (0, 64, 128, 256, 512, T):
        ax.text(place(t) - 2 * (t == 512), 51.6, f"{t}", ha="center", fontsize=8, color=GREY)
    ax.text(place(70), 49.2, "16, 32 as well", ha="left", fontsize=8, color=GREY)
    ax.plot([place(0), place(512)], [46.6, 46.6], color=RED, lw=2)
    ax.text(place(508), 47.4, "only what was read before a chunk routes it (here: the one at 512)", ha="right", fontsize=8, color=RED)
    arrow(ax, (place(512), 46.6), (place(512), 54), RED)

    ax.text(1, 42, "2  One decision for all layers", fontsize=10, weight="bold", color=INK)
    chain = ["token embeddings\nsince BOS, frozen\nin Phase B", "mean, less the mean\nof all text", "scores: a router row\nfor every block\nand head of a layer",
             "the best k,\neach with the gate\n2 sigmoid(score)"]
    for i, text in enumerate(chain):
        box(ax, 2 + 24.6 * i, 33, 20, 7, text=text)
        if i:
            arrow(ax, (24.6 * i - 2.4, 36.5), (2 + 24.6 * i, 36.5))

    ax.text(1, 29, f"3  In every layer: {blocks} blocks of {cl['block']} hidden units, and {HEADS} heads", fontsize=10, weight="bold", color=INK)
    size = 3.0
    for r, (name, start, chosen, chosen_heads) in enumerate(ROWS):
        y = 20 - 7 * r
        ax.text(2, y + size / 2, name, fontsize=8.5, va="center", color=INK)
        for b in range(blocks):
            on = b < shared or b - shared in chosen
            box(ax, 24 + (size + 0.25) * b + (1 if b >= shared else 0), y, size, size, face=GREY if b < shared else RED if on else "white",
                edge=INK if on else GREY)
        for h in range(HEADS):
            on = h < heads or h - heads in chosen_heads
            box(ax, 79.5 + 2.4 * h + (0.6 if h >= heads else 0), y, 2.1, size, face=GREY if h < heads else RED if on else "white",
                edge=INK if on else GREY)
    ax.text(24, 24.6, "MLP: shared blocks, then routed ones", fontsize=8, color=GREY)
    ax.text(79.5, 24.6, "attention heads", fontsize=8, color=GREY)
    for x, face, text in ((24, GREY, "shared: serves every token"), (46, RED, "chosen"), (57, "white", "idle: if no chunk of the batch chose it, no bit of it moves")):
        box(ax, x, 1.2, 2, 2, face=face)
        ax.text(x + 2.8, 2.2, text, fontsize=8, va="center", color=INK)
    return fig


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_name("model-cl.png"), dpi=130)
