"""
Any script of the nanochat tree under the patches, so that it takes the checkpoints of all arms.

python -m nanochat_cl.script scripts.base_eval --eval sample --model-tag d4_cl_s42
"""
import argparse

from nanochat_cl import command, patching, upstream


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="nanochat_cl.script", description="Run a script of the nanochat tree under the patches")
    parser.add_argument("script", help="scripts.base_eval, for instance")
    parser.add_argument("flags", nargs=argparse.REMAINDER, metavar="...", help="its flags")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if not (path := upstream.tree() / f"{args.script.replace('.', '/')}.py").is_file():
        raise command.UserError(f"expected a script such as scripts.base_eval, got {args.script}; there is no {path}")
    with patching.applied():
        upstream.run_script(args.script, args.flags)


if __name__ == "__main__":
    command.run(main)
