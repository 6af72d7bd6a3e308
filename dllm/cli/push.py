"""`dllm push`: an export on the model hub."""

from __future__ import annotations

import argparse

from dllm.cli.export import add_format_argument

HELP = "export a checkpoint and upload it to the model hub"
EXAMPLES = """examples:
  dllm push chat-large me/my-chatbot --private         export the run, make the repository, upload
  dllm push results/laptop/exports/chat-large-transformers me/my-chatbot
                                                       upload an export as it is, its card edited perhaps
  dllm push chat-large me/my-chatbot --revision steps-1000
                                                       onto a branch, which is made if it is not there

It needs a token that may write: HF_TOKEN, or `hf auth login`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("model", metavar="RUN", help="run below results/, model directory, or what dllm export wrote")
    parser.add_argument("repository", metavar="HUB_ID", help="repository of the hub: owner/name")
    add_format_argument(parser)
    parser.add_argument("--private", action="store_true", help="only for you to see, if it is made now")
    parser.add_argument("--revision", metavar="BRANCH", help="branch that the commit goes to (default: main)")


def run(args: argparse.Namespace) -> int:
    """Export, upload, and say where it is."""
    from dllm.exporting.export import is_export
    from dllm.exporting.push import check_push, push

    check_push(args.repository)
    directory = args.model
    if not is_export(directory):
        from dllm.cli.export import exported

        directory = exported(args.model, args.format)
        print(f"exported: {directory}", flush=True)
    print(push(directory, args.repository, private=args.private, branch=args.revision))
    return 0
