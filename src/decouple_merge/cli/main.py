"""The command ``deme``: each verb is one function of the library. Heavy imports stay inside the handlers."""

import sys

import typer

from .files import info, merge
from .images import sample
from .runs import analyze, finetune, fisher, pretrain, run, search
from .scores import evaluate, stats

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)
for verb in (run, finetune, search, analyze, fisher, merge, info, sample, evaluate, stats, pretrain):
    app.command()(verb)


def main() -> None:
    """Run the command; a user's mistake is one line on stderr and exit status 2."""
    try:
        app(standalone_mode=True)
    except ValueError as error:
        print("deme: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        from ..storage.files import is_disk_full

        if not is_disk_full(error):
            raise
        print("deme: the disk is full; make room and run the same command again to go on", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("deme: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
