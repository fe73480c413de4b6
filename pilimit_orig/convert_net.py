"""Turn a checkpoint of the original code into a plain dictionary of tensors.

    python -m pilimit_orig.convert_net IN [OUT]

OUT is IN with _converted.th for its ending where it is left out. IN is a whole pickled network, a
pickled dictionary, or a dictionary that was converted before. Nothing in it is executed and the
original code is not needed. Layers keep their numbers. L of the original counts stages of ReLU
units, the library's L and --depth hidden π-layers, one less: the paper's network is L = 2 there and
L = 1 here.
"""

import os
import sys

from pilimit_orig import checkpoint
from pilimit_orig.command import CommandLine


def main(argv=None):
    parser = CommandLine(
        prog="python -m pilimit_orig.convert_net", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("input", metavar="IN", help="a checkpoint of the original code")
    parser.add_argument(
        "output",
        metavar="OUT",
        nargs="?",
        help="where to write (default: IN with _converted.th for its ending)",
    )
    args = parser.parse_args(argv)
    output = args.output or os.path.splitext(args.input)[0] + "_converted.th"
    if (
        os.path.exists(output)
        and os.path.exists(args.input)
        and os.path.samefile(output, args.input)
    ):
        parser.error(f"OUT is IN ({output}): give another name")
    try:
        net = checkpoint.read(args.input)
        print(checkpoint.describe(net))
        checkpoint.write(net, output)
    except (checkpoint.CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
