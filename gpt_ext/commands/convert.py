"""`gpt-ext convert`: models of other projects in, ours out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from gpt_ext import gpt2, pretrained, tokenizer
from gpt_ext.commands import Parser
from gpt_ext.errors import UserError

Target = Literal["gpt_ext", "gpt2", "onnx", "program"]


def parser() -> Parser:
    """Of the two files or folders, the format, and what the first may not tell."""
    parser = Parser(description="Reads a model of any kind that GPT knows, and writes it anew.")
    parser.add_argument(
        "source", type=str, help="a run, a folder of ours or of a GPT-2, or a file of weights"
    )
    parser.add_argument("target", type=str, help="the new folder, or the new file")
    parser.add_argument(
        "--to",
        type=Target,
        default="gpt_ext",
        help="a folder of ours; a folder that transformers loads; a file that ONNX Runtime, or "
        "torch.export.load, loads",
    )
    parser.add_argument("--tokenizer", type=str, help="a tokenizer.json, or a folder that has one")
    parser.add_argument("--num-heads", type=int, help="of a file that does not tell")
    parser.add_argument("--activation", type=str, help="of a file that does not tell")
    return parser


def run(options: Any) -> int:
    source, target = Path(options.source), Path(options.target)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target} exists already")
    told = {"num_heads": options.num_heads, "activation": options.activation}
    given = {name: value for name, value in told.items() if value is not None}
    model, coder = pretrained.load(source, **given)
    if options.tokenizer is not None:
        coder = tokenizer.load_tokenizer(Path(options.tokenizer))
    if coder is not None and len(coder) > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {len(coder)} tokens, and the model knows {model.config.vocab_size}"
        )
    if options.to == "gpt_ext":
        pretrained.save(model, target, coder)
    elif options.to == "gpt2":
        gpt2.save(model, target, coder)
    else:
        from gpt_ext import export

        (export.save_onnx if options.to == "onnx" else export.save_program)(model, target)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{target}: {options.to}, {parameters:,} parameters, {model.config}")
    return 0
