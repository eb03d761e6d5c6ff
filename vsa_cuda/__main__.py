"""Command line: python -m vsa_cuda info | demo."""

import argparse
import sys

from vsa_cuda.info import info


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m vsa_cuda", description="Video Sparse Attention")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, device, backend in use and why")
    commands.add_parser("demo", help="VSA on a real video; see demo --help", add_help=False)
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "demo":
        from vsa_cuda import demo

        return demo.main(rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    for name, value in info().items():
        print(f"{name:10}{value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
