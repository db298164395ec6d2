"""Options that several commands have: one thing has one name, one type and one text."""

import os
from collections.abc import Callable
from pathlib import Path

import click

from bitwright.cli.grouped import (
    Add,
    calibration_option,
    file_option,
    method_option,
    precision_option,
    run_option,
)
from bitwright.cli.noted import PAGE, PUSH, TEXT_KEY
from bitwright.cli.parameters import (
    Bits,
    GroupSize,
    Model,
    NewFile,
    Override,
    Precisions,
    PrecisionWords,
    Size,
    TensorType,
)
from bitwright.files.home import expanded
from bitwright.files.links import follow_links
from bitwright.formats import FORMATS
from bitwright.methods.registry import METHODS
from bitwright.precision.schemes import SCHEMES

PATH = click.Path(path_type=Path)
TEXT = (
    "Text, JSON or JSON lines, .csv or Parquet, chats included, or token ids (.npy); several files with "
    "shares are a.jsonl:3,b.txt:1"
)
DTYPE = click.Choice(["float32", "float16", "bfloat16"])


def together(*options: Add) -> Add:
    """Return what adds several options, which help shows in this order."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def check_apart(**files: Path | None) -> None:
    """Refuse options that name one file, of which one would write over the other."""
    places: dict[str, str] = {}
    for name, path in files.items():
        if path is not None:
            other = places.setdefault(os.path.realpath(expanded(path)), name)
            if other != name:
                raise click.UsageError(f"--{other} and --{name} are the same file, {path}")


def _enter_links(context: click.Context, _: click.Parameter, follow: bool | None) -> None:
    if follow is not None:
        context.with_resource(follow_links(follow))


def _enter_push(context: click.Context, _: click.Parameter, name: str | None) -> None:
    """Note where the output goes, before anything is computed; the hub is asked who that is."""
    if name is not None and not context.resilient_parsing:
        from bitwright.tools.upload import check_upload

        check_upload(name)
        context.meta[PUSH] = name


# Input and output

model = click.argument("model", type=Model())
out = file_option("-o", "--out", required=True, type=PATH, help="Folder to write.")
overwrite = file_option("--overwrite", is_flag=True, help="Replace an existing checkpoint folder.")
links = file_option(
    "--links/--no-links",
    default=None,
    is_eager=True,
    expose_value=False,
    callback=_enter_links,
    help="Follow all links out of folders of models, statistics and targets, or refuse folders with any; "
    "by default only weights, their index, statistics and targets may be links to other places.",
)
base_model = file_option(
    "--base-model",
    metavar="ORG/NAME",
    help="The original, for the card at the hub; by default what the card in the folder says.",
)
private = file_option(
    "--private", is_flag=True, help="Make a model at the hub that others do not see."
)
push = file_option(
    "--push-to",
    metavar="ORG/NAME",
    expose_value=False,
    callback=_enter_push,
    help="Put the folder on the hub, too, when it is written; see bitwright upload.",
)


def _enter_page(context: click.Context, _: click.Parameter, place: Path | None) -> None:
    context.meta[PAGE] = place


page = file_option(
    "--html",
    type=NewFile(),
    metavar="FILE",
    expose_value=False,
    callback=_enter_page,
    help="Write one page that shows settings, sizes, errors and figures to this file.",
)


def format(default: str) -> Add:
    """Return the option for the format of the folder that is written."""
    return file_option(
        "-f", "--format", type=click.Choice(list(FORMATS)), default=default, help="Format to write."
    )


# Calibration


def calibration(help: str = "") -> Add:
    """Return the option for what a command is calibrated on; `help` goes on after what that may be."""
    given = calibration_option(
        "--calibration", type=PATH, help=f"{TEXT}{help}; by default a text that bitwright carries."
    )
    return together(given, text_key)


def _enter_text_key(context: click.Context, _: click.Parameter, key: str | None) -> None:
    context.meta[TEXT_KEY] = key


text_key = calibration_option(
    "--text-key",
    metavar="KEY",
    expose_value=False,
    callback=_enter_text_key,
    help="The key of a record's text or list of messages; by default the first known one.",
)


def samples(default: int, add: Callable[..., Add] = calibration_option) -> Add:
    """Return the option for the number of samples, by default at most so many."""
    return add("--samples", type=click.IntRange(1), help=f"How many; by default up to {default}.")


def length(least: int, add: Callable[..., Add] = calibration_option) -> Add:
    """Return the option for the tokens of a sample."""
    return add(
        "--length",
        type=click.IntRange(least),
        help="Tokens per sample; by default 512 of a text, or as many as the model has positions, and "
        "the whole rows of an array.",
    )


def bos(add: Callable[..., Add] = calibration_option) -> Add:
    """Return the option for the token that samples begin with."""
    return add(
        "--bos/--no-bos",
        default=True,
        help="Begin every sample of a text with the token that the tokenizer puts first, or not.",
    )


seed = calibration_option("--seed", type=click.IntRange(0), default=0, help="Chooses the samples.")
chosen_tokens = together(samples(128), length(1), seed, bos())

# Precision


def _enter_scheme(context: click.Context, _: click.Parameter, name: str | None) -> None:
    """Take what a scheme says where the command line has nothing."""
    if name is None:
        return
    said = {each: str(value) for each, value in SCHEMES[name].items()}
    context.default_map = {**said, **(context.default_map or {})}


scheme = precision_option(
    "--scheme",
    type=click.Choice(list(SCHEMES)),
    is_eager=True,
    expose_value=False,
    callback=_enter_scheme,
    help="Format, bits, group size and grid by a known name, each of which an option may replace.",
)
bits = precision_option(
    "-b",
    "--bits",
    type=PrecisionWords(),
    default="4",
    help="Bits per code (2, 3, 4, 5, 6 or 8), with or without a group size, as in 4:64; or a grid or type, "
    "as for --grid.",
)
group_size = precision_option(
    "-g",
    "--group-size",
    type=GroupSize(),
    default="auto",
    help="Input channels per scale; -1 is the whole row, auto 64 or what the format asks for.",
)
candidates = precision_option(
    "--candidates",
    type=Precisions(),
    help="BITS:GROUP_SIZE,… to choose from for each layer, or types of one grid, such as Q3_K,Q4_K; group "
    "size -1 is the whole row. By default what the format has near the target.",
)
grid = precision_option(
    "--grid",
    type=PrecisionWords(),
    metavar="PRECISION",
    help="What codes stand for, by default the format's first: affine, zero_point, symmetric, or k (GGUF's "
    "Q2_K to Q6_K); iq4_nl or iq4_xs; mxfp4, nvfp4 or mxfp8; or a type of GGUF, such as Q4_K.",
)
mixture = together(
    precision_option(
        "--type",
        metavar="NAME",
        help="A mixture of types by llama.cpp's name, such as Q4_K_M, in place of --bits (gguf).",
    ),
    precision_option(
        "--pure", is_flag=True, help="The type of most tensors for all of them (gguf)."
    ),
    precision_option(
        "--tensor-type",
        "tensor_types",
        multiple=True,
        type=TensorType(),
        metavar="PATTERN=TYPE",
        help="Another type for tensors in whose GGUF names this regular expression is found.",
    ),
    precision_option(
        "--token-embedding-type", metavar="TYPE", help="That of the embedding (gguf)."
    ),
    precision_option("--output-tensor-type", metavar="TYPE", help="That of the head (gguf)."),
)
split_max_size = file_option(
    "--split-max-size",
    type=Size(),
    metavar="SIZE",
    help="Write several GGUF files, with tensors of at most so many bytes in each, such as 2G or 500M.",
)
float_embeddings = precision_option(
    "--float-embeddings",
    is_flag=True,
    help="Leave embedding and head in float, unless their bits are given (mlx, gguf).",
)
ends = together(
    float_embeddings,
    precision_option("--embedding-bits", type=Bits(), help="Other bits for the embedding."),
    precision_option("--head-bits", type=Bits(), help="Other bits for the head."),
)
allow_unfused = precision_option(
    "--allow-unfused",
    is_flag=True,
    help="Let layers differ that vLLM computes as one module: for engines that fuse nothing.",
)
exceptions = together(
    precision_option(
        "--exclude", multiple=True, metavar="GLOB", help="Leave these layers in float."
    ),
    precision_option(
        "--override",
        "overrides",
        multiple=True,
        type=Override(),
        metavar="GLOB=PRECISION",
        help="Another precision for these layers, as for --bits; the last match wins.",
    ),
    allow_unfused,
)


def target_bpw(help: str) -> Add:
    """Return the option for the size of a model of dynamic precision."""
    return precision_option("--target-bpw", type=click.FloatRange(0, min_open=True), help=help)


target_size = precision_option(
    "--target-size",
    type=Size(),
    metavar="SIZE",
    help="Bytes of all weight files, such as 3.2GB, 500M or 2GiB: precisions are chosen within that, also "
    "of embedding and head.",
)

# Method

method = method_option(
    "-m",
    "--method",
    type=click.Choice(list(METHODS)),
    default="gptq",
    help="Quantization method.",
)
salient_ratio = method_option(
    "--salient-ratio",
    type=click.FloatRange(0, 1),
    default=0.01,
    help="Share of the weights to protect (salient).",
)

# Run

resume = run_option(
    "--resume/--no-resume",
    default=True,
    help="Go on where the same command was interrupted, or start over.",
)
memory = run_option(
    "--memory",
    type=click.FloatRange(0, min_open=True),
    metavar="GB",
    help="What the process may take; by default three quarters of what is free.",
)
threads = run_option(
    "--threads", type=click.IntRange(1, 1024), help="Threads to use; by default all processors."
)
resumable = together(resume, memory)
