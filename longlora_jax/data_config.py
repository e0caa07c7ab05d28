"""What a run reads: the part of the configuration that data/ works by."""

import math
from dataclasses import dataclass

ROWS = ("jsonl", "csv", "parquet", "hf")  # sources of rows


@dataclass
class DataConfig:
    """Where documents come from and how they become windows (see longlora_jax.data)."""

    source: str = "text"  # text | python | jsonl (.jsonl, .json, .csv) | csv | parquet | hf | tokens | arrayrecord
    # A file, folder or glob; python: "" is the running interpreter's library; hf: also a name of the hub;
    # tokens: ids as raw uint16 or uint32; arrayrecord: what longlora_jax.data.prepare has written.
    path: str = ""
    split: str = "train"  # hf only: a split, or a part of one: train[:4], train[10%:], train+test
    text_key: str = "text"  # jsonl, parquet and hf: where the text is in a row
    streaming: bool = False  # hf only: read rows as they are needed, download no whole data set first
    tokenizer: str = ""  # a folder with tokenizer files; "": that of init_from
    add_bos: bool = True  # begin documents with BOS where the tokenizer adds one; a chat template alone says for chats
    hold_out: tuple[str, ...] = ()  # files by name that are never read
    only: tuple[str, ...] = ()  # read these files alone
    # A share of the rows (of the files of text, of the modules) that is never trained on: by a hash of each, so that it
    # is the same in every order, and equal rows stay together. eval.data reads these and no others.
    hold_out_share: float = 0.0
    max_tokens: int = 0  # stop reading after so many tokens; 0: read all
    on_bad_row: str = "stop"  # stop | skip (and count): a row that cannot be read or has no text
    task: str = "text"  # text: every token is a target | sft: rows are instructions or chats, answers are the targets
    prompt: str = "chat"  # sft: chat (the tokenizer's own template) | alpaca (LongLoRA's Llama-2 prompt)
    # sft: a system message for rows that have none; the run's template then has it for whoever asks without one.
    system: str = ""
    columns: str = ""  # sft: ours=theirs,... where columns have other names: instruction=question; "tools=": not read
    too_long: str = "drop"  # sft, of examples longer than seq_len: drop | cut_left | cut_right | stop
    last_turn_only: bool = False  # sft: of a conversation's answers the last alone is learnt
    fold_system: bool = False  # sft: a system message that the template refuses goes before the first question
    # concat: documents joined and cut (the paper's) | best_fit: whole documents, as many as fit, each a segment of its
    # own | long: windows out of one long document each
    packing: str = "concat"
    min_tokens: int = 0  # long: shorter documents are left out; 0: those shorter than a window
    weight: float = 1.0  # the share of rows that come from here is weight / sum of weights (Config.mixture)


DATA_CHOICES = {
    "source": ("text", "python", "jsonl", "csv", "parquet", "hf", "tokens", "arrayrecord"),
    "task": ("text", "sft"),
    "prompt": ("chat", "alpaca"),
    "packing": ("concat", "best_fit", "long"),
    "on_bad_row": ("stop", "skip"),
    "too_long": ("drop", "cut_left", "cut_right", "stop"),
}


def data_faults(name: str, data: DataConfig, seq_len: int) -> list[str]:
    """What is wrong with a DataConfig, which has this name in its config; seq_len: the window in tokens."""
    faults = []
    for field_name, choices in DATA_CHOICES.items():
        value = getattr(data, field_name)
        if value not in choices:
            faults.append(f"{name}.{field_name}={value!r} is unknown: use one of {', '.join(choices)}")
    if data.max_tokens < 0:
        faults.append(f"{name}.max_tokens={data.max_tokens} must be 0 (read all) or more")
    if not 0 < data.weight < math.inf:  # NaN fails as well
        faults.append(f"{name}.weight={data.weight} is no share: give a number above 0, or leave the data out")
    if data.min_tokens and (data.packing != "long" or data.min_tokens < seq_len):
        faults.append(
            f"{name}.min_tokens={data.min_tokens} has no effect: it is for packing='long', and a window out of one "
            f"document needs seq_len={seq_len} tokens anyway; give more, or 0"
        )
    if data.task == "sft" and data.packing != "best_fit":
        faults.append(
            f"{name}.packing={data.packing!r} would cut answers: set it to best_fit for {name}.task='sft', "
            "which packs whole examples"
        )
    if data.task == "sft" and data.source not in ROWS:
        faults.append(f"{name}.source={data.source!r} has no rows of instructions: use one of {', '.join(ROWS)}")
    if data.task != "sft":
        given = [n for n in ("system", "columns", "last_turn_only", "fold_system") if getattr(data, n)]
        given += ["too_long"] if data.too_long != "drop" else []
        faults += [f"{name}.{n} has no effect: it is for {name}.task='sft' (text_key names a text)" for n in given]
    if data.split != "train" and data.source != "hf":
        faults.append(
            f"{name}.split={data.split!r} is for source 'hf', {data.source!r} has no splits: name the files of a part "
            "in path, or hold out a share of the rows (hold_out_share)"
        )
    if not 0 <= data.hold_out_share < 1:
        faults.append(f"{name}.hold_out_share={data.hold_out_share} is a share of the rows: give 0 to below 1")
    if data.hold_out_share and data.source in ("tokens", "arrayrecord"):
        faults.append(
            f"{name}.hold_out_share is by a hash of each row, and source {data.source!r} has tokens alone: "
            "prepare two parts"
        )
    return faults


def same_rows(one: DataConfig, other: DataConfig) -> bool:
    """Whether two read the same rows, their shares apart."""
    return (one.source, one.path, one.split) == (other.source, other.path, other.split)


def part_faults(parts: dict[str, DataConfig]) -> list[str]:
    """What the data of a run, by their names, may not have between them: two prompts, rows that train and evaluate."""
    faults = []
    prompts = {
        name: part.prompt + (f", {name}.system={part.system!r:.40}" if part.system else "")
        for name, part in parts.items()
        if part.task == "sft"
    }
    if len(set(prompts.values())) > 1:
        given = ", ".join(f"{name}.prompt={prompt}" for name, prompt in prompts.items())
        faults.append(f"{given}: a model is asked under one prompt, set the same everywhere")
    if (ours := parts.get("eval.data")) is None or not ours.hold_out_share:
        return faults
    for name, part in parts.items():
        if part is not ours and same_rows(part, ours) and part.hold_out_share != ours.hold_out_share:
            faults.append(
                f"{name}.hold_out_share={part.hold_out_share} and eval.data.hold_out_share={ours.hold_out_share} are "
                "of the same rows: set the same, or rows that are trained on would be evaluated"
            )
    return faults
