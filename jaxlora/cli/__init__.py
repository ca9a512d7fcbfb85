"""The command line: look at an adapter, convert it, merge it. docs/command_line.md."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence

import jax

from jaxlora import __version__
from jaxlora._errors import CheckpointError, MaterializeError, RolesError, TargetError

__all__ = ["main"]

_EPILOG = """\
exit codes: 0 done; 1 a file, a directory or an adapter is not what it should be (the message
says which, and what was expected); 2 the command was not understood; 130 interrupted.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; what it returns is the exit code.

    >>> main(["inspect", "nowhere"])
    1
    """
    args = _parser().parse_args(arguments)
    try:
        if not os.environ.get("JAX_PLATFORMS"):  # nothing here is worth an accelerator's memory
            jax.config.update("jax_platforms", "cpu")
        with jax.enable_x64(True):  # a file of float64 stays one; nothing else changes
            args.run(args)
    except (TargetError, CheckpointError, RolesError, MaterializeError, ValueError) as error:
        return _failed(str(error))
    except ImportError as error:
        return _failed(str(error))
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        return _failed(f"{name}{error.strerror or error}")
    except KeyboardInterrupt:
        return _failed("interrupted; nothing was left behind", 130)
    return 0


def _failed(text: str, code: int = 1) -> int:
    print(f"jaxlora: {text}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxlora",
        description="Adapters on disk: look at them, convert them, merge them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"jaxlora {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_inspect(commands)
    _add_convert(commands)
    _add_merge(commands)
    return parser


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    inspect = commands.add_parser(
        "inspect",
        allow_abbrev=False,
        help="a table of an adapter",
        description="A table of an adapter, PEFT's or jaxlora's: format, ranks, scales, sizes, "
        "dtypes and norms. Layers that are alike share a row.",
    )
    inspect.add_argument("directory", type=pathlib.Path, help="the adapter")
    inspect.add_argument("--all", action="store_true", help="a row for each layer")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_run_inspect)


def _run_inspect(args: argparse.Namespace) -> None:
    from jaxlora.cli._inspect import inspect

    print(inspect(args.directory, every=args.all, as_json=args.json))


def _add_convert(commands: argparse._SubParsersAction) -> None:
    convert = commands.add_parser(
        "convert",
        allow_abbrev=False,
        help="from jaxlora's checkpoints to PEFT's directories, and back",
        description="Writes an adapter in the other format: what jaxlora.checkpoint wrote as "
        "PEFT's directory, or PEFT's as a checkpoint of jaxlora.",
    )
    convert.add_argument("source", type=pathlib.Path, help="an adapter, in either format")
    convert.add_argument("out", type=pathlib.Path, help="a directory, which is not there yet")
    convert.add_argument(
        "--names",
        type=pathlib.Path,
        required=True,
        metavar="FILE",
        help="JSON: the map from the params' paths to PyTorch's modules, as of jaxlora.peft",
    )
    convert.add_argument(
        "--base",
        type=pathlib.Path,
        metavar="PARAMS",
        help="the base's params: a checkpoint of orbax, or a safetensors file whose keys are the "
        "paths. From PEFT it is needed; to PEFT only for `tokens`, and it is checked",
    )
    convert.add_argument("--base-model-name", metavar="NAME", help="of the base on the Hub")
    convert.add_argument("--task-type", metavar="TYPE", help="PEFT's, for instance CAUSAL_LM")
    convert.add_argument(
        "--for-serving", action="store_true", help="only what vLLM reads; see jaxlora.peft.save"
    )
    _add_allow(convert)
    convert.set_defaults(run=_run_convert)


def _add_allow(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=["ensure_weight_tying"],
        metavar="NAME",
        help="what to take otherwise than PEFT's file says: ensure_weight_tying, an adapter of a "
        "tied embedding that was made for its lookup alone",
    )


def _run_convert(args: argparse.Namespace) -> None:
    from jaxlora.cli._convert import convert

    print(
        convert(
            args.source,
            args.out.expanduser().resolve(),
            args.names,
            base=args.base,
            allow=args.allow,
            base_model_name=args.base_model_name,
            task_type=args.task_type,
            for_serving=args.for_serving,
        )
    )


def _add_merge(commands: argparse._SubParsersAction) -> None:
    merge = commands.add_parser(
        "merge",
        allow_abbrev=False,
        help="fold an adapter into a base of safetensors files",
        description="Writes the base with the adapter folded in, W + scale B A, shard by shard: "
        "neither the base nor the result is ever whole in memory.",
    )
    merge.add_argument(
        "base", type=pathlib.Path, help="a safetensors file, or a directory of Hugging Face"
    )
    merge.add_argument("adapter", type=pathlib.Path, help="PEFT's directory, or jaxlora's")
    merge.add_argument("out", type=pathlib.Path, help="a file or directory, not there yet")
    merge.add_argument(
        "--names",
        type=pathlib.Path,
        metavar="FILE",
        help="JSON, the map of jaxlora.peft. For an adapter of jaxlora on a base with PyTorch's "
        "names: from its params' paths; without it, the base's keys have to be those paths. For "
        "one of PEFT's, whose map is read off it: from the base's keys, where shapes do not tell",
    )
    _add_allow(merge)
    merge.add_argument(
        "--allow-base-mismatch",
        action="store_true",
        help="merge an adapter of jaxlora into another base than its own, of the same shapes",
    )
    merge.add_argument("--quiet", action="store_true", help="no progress bar")
    merge.set_defaults(run=_run_merge)


def _run_merge(args: argparse.Namespace) -> None:
    from jaxlora.cli._merge import merge

    print(
        merge(
            args.base,
            args.adapter,
            args.out.expanduser().resolve(),
            names=args.names,
            allow=args.allow,
            allow_base_mismatch=args.allow_base_mismatch,
            quiet=args.quiet,
        )
    )
