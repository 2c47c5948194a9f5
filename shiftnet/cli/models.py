"""Lists the trained networks that commands and shiftnet.load take by name."""

import json
from collections.abc import Sequence

from shiftnet import config as config_lib
from shiftnet import zoo
from shiftnet.errors import UserError, reported

# What --json prints of a network.
FIELDS = (
    *("name", "dataset", "accuracy", "over_seeds", "epoch", "reported"),
    *("parameters", "multiply_adds", "bytes", "recipe"),
)


@reported
def main(argv: Sequence[str] | None = None) -> int:
    """Lists what the command line names; returns the exit code."""
    parser = config_lib.Parser(prog="shiftnet models", description=__doc__)
    parser.add_argument(
        "pattern",
        nargs="?",
        default="*",
        metavar="PATTERN",
        help="of names, with wildcards, such as '*c100*' (default: all)",
    )
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    forms.add_argument(
        "--card", action="store_true", help="print each network's card instead: all that is known"
    )
    arguments = parser.parse_args(argv)
    models = zoo.list_models(arguments.pattern)
    if not models:
        zoo.named(arguments.pattern, "PATTERN")  # a single name is answered with the nearest
        raise UserError(f"no trained network matches {arguments.pattern!r}")
    if arguments.json:
        rows = [{field: getattr(model, field) for field in FIELDS} for model in models]
        print(json.dumps(rows, indent=2))
    elif arguments.card:
        from shiftnet.inference import Classifier  # these import JAX
        from shiftnet.zoo import cards

        for model in models:
            network = Classifier.load(zoo.file_of(model))
            print(cards.card(model.name, network, model.bytes, model))
    else:
        print(models)
    return 0
