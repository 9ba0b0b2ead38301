"""Command lines of all programs, exit statuses, and what a user sees of libraries' logs and warnings."""

import json
import logging
import re
import shlex
import warnings
from dataclasses import MISSING

import convert
import diffusers
import fetch_prompts
import finetune
import generate
import main_text2image
import metrics
import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import tiny_pipeline

from vqdm.cli import run_script
from vqdm.config import all_settings, build, generate_command
from vqdm.diffusion.pipelines import log_truncated
from vqdm.errors import RunError, UserError
from vqdm.metrics.catalogue import NAMES

BASIC = ["model", "calibration.txt", "evaluation.txt"]
# Parser and positional arguments of every program.
PROGRAMS = {
    "main_text2image": (main_text2image.PARSER, BASIC),
    "finetune": (finetune.PARSER, ["model", "quantized", "calibration.txt", "evaluation.txt"]),
    "generate": (generate.PARSER, ["model", "quantized", "prompts.txt"]),
    "metrics": (metrics.PARSER, ["images"]),
    "compare": (metrics.COMPARE_PARSER, ["one", "two"]),
    "convert": (convert.PARSER, ["dequantize", "folder"]),
    "fetch_prompts": (fetch_prompts.PARSER, ["coco", "coco.csv"]),
}
SETTINGS = {name: [one for _, one in all_settings(parser.kind)] for name, (parser, _) in PROGRAMS.items()}
FLAGS = [(name, one) for name, found in SETTINGS.items() for one in found if not one.flag.positional]
# Flags that contradict the defaults of others, and values of those whose value cannot be any.
COMPANIONS = {
    ("main_text2image", "code"): {"target_bits": 3},
    ("convert", "model"): {"trust_pickle": True},
    ("convert", "trust_pickle"): {"model": "text"},
    ("convert", "single_file_config"): {"model": "text", "trust_pickle": True},
    ("convert", "local_files_only"): {"model": "text", "trust_pickle": True},
    ("finetune", "real_images"): {"finetune_method": "real"},
    ("finetune", "finetune_method"): {"real_images": "folder"},
}
for with_pairs in ("main_text2image", "finetune"):
    COMPANIONS[with_pairs, "visualize_nsamples"] = {"evaluation_nsamples": 99}
    COMPANIONS |= {(with_pairs, "height"): {"width": 64}, (with_pairs, "width"): {"height": 64}}
TEXTS = {
    "code": "trellis",
    "on_save": "ls {path}",
    "finetune_method": "real",
    "shard": "2/3",
    "metrics": ["fid", "clip"],
    "names": ["one", "two"],
}


def config_of(*flags):
    return main_text2image.PARSER.parse([*BASIC, *flags])


def other_value(one):
    """A value of a flag that is not its default, as a `--config` file holds it."""
    if one.name in TEXTS:
        return TEXTS[one.name]
    if one.kind is bool:
        return not one.default
    if one.flag.choices:
        return next(value for value in one.flag.choices if value != one.default)
    if one.kind in (int, float):
        tried = [one.kind(value) for value in (24, 0.5, 1, 2, 3)]
        return next(value for value in tried if one.accepts(value) and value != one.default)
    return ["a", "b"] if one.kind is tuple else "text"


def parts_of(need):
    """Whether the other flag must not be so, its name, and the values it must have; of every alternative."""
    for part in need.split(" or "):
        name, *allowed = part.removeprefix("not ").split()
        yield part.startswith("not "), name, allowed[0].split("|") if allowed else []


def fulfilled(program, one) -> dict:
    """Values of other flags with which a flag has an effect, where the defaults are others."""
    known = {setting.name: setting for setting in SETTINGS[program]}
    found = {}
    for need in one.flag.needs:
        negative, name, allowed = next(parts_of(need))
        if negative and known[name].default is not None and str(known[name].default) in allowed:
            found[name] = next(value for value in known[name].flag.choices if str(value) not in allowed)
        elif not negative and (allowed or not known[name].default):
            found[name] = allowed[0] if allowed else other_value(known[name])
    return found


def broken(program, need) -> dict:
    """Values of other flags with which a condition does not hold."""
    known = {setting.name: setting for setting in SETTINGS[program]}
    found = {}
    for negative, name, allowed in parts_of(need):
        if negative:
            found[name] = allowed[0] if allowed else other_value(known[name])
        elif allowed:
            choices = known[name].flag.choices or NAMES
            found[name] = next(choice for choice in choices if choice not in allowed)
        elif known[name].default:
            found[name] = 0
    return {name: [value] if known[name].kind is tuple else known[name].kind(value) for name, value in found.items()}


def bad_values(one):
    """Texts just outside the range of a number, and what is no number."""
    flag, step = one.flag, 1 if one.kind is int else 0.001
    texts = ["many", "nan", *([] if flag.ge is None else [str(flag.ge - step)])]
    texts += [] if flag.gt is None else [str(flag.gt)]
    texts += [] if flag.le is None else [str(flag.le + step)]
    texts += [] if flag.lt is None else [str(flag.lt)]
    return texts


# ------------------------------------------------------------------------------------------- every flag


@pytest.mark.parametrize(("program", "one"), FLAGS, ids=[f"{name}-{one.name}" for name, one in FLAGS])
def test_every_flag_is_declared_whole(program, one):
    """It has a help text, its default is allowed, and the parser, the dataclass and a --config file agree on it."""
    parser, _ = PROGRAMS[program]
    assert one.flag.help and not one.flag.help.endswith(".") and one.default is not MISSING
    assert one.accepts(one.default)
    (action,) = (one_of for one_of in parser._actions if f"--{one.name}" in one_of.option_strings)
    assert action.default == one.default and parser.get_default(one.name) == one.default


def given_by_place(program) -> dict:
    """Name → value of the positional arguments in PROGRAMS."""
    names, words = [one.name for one in SETTINGS[program] if one.flag.positional], PROGRAMS[program][1]
    return {"runs": words} if program == "compare" else dict(zip(names, words, strict=True))


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_command_line_without_flags_is_the_dataclass_with_its_defaults(program):
    parser, words = PROGRAMS[program]
    assert parser.parse(words) == build(parser.kind, given_by_place(program))


@pytest.mark.parametrize(("program", "one"), FLAGS, ids=[f"{name}-{one.name}" for name, one in FLAGS])
def test_every_flag_does_the_same_on_the_command_line_and_in_a_config_file(program, one, tmp_path):
    parser, words = PROGRAMS[program]
    value = other_value(one)
    if one.name == "overrides":
        (tmp_path / "plan.json").write_text('{"a": null}')
        value = str(tmp_path / "plan.json")
    values = {one.name: value} | COMPANIONS.get((program, one.name), {}) | fulfilled(program, one)
    if program == "generate" and one.name == "teacher":
        words = ["model", "prompts.txt"]
    words = [values.pop("kind", words[0]), *words[1:]]
    flags = []
    for name, given in values.items():
        on = [] if given is True else [str(given)] if not isinstance(given, list) else given
        flags += [f"--no-{name}"] if given is False else [f"--{name}", *on]
    for suffix, dump in (("yaml", yaml.safe_dump), ("json", json.dumps)):
        path = tmp_path / f"flags.{suffix}"
        path.write_text(dump(values))
        found = parser.parse([*words, "--config", str(path)])
        assert found == parser.parse([*words, *flags])
        assert found != parser.parse(PROGRAMS[program][1])


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_flag_without_an_effect_is_one_line_that_names_it_and_what_it_lacks(program):
    parser, _ = PROGRAMS[program]
    given, tried = given_by_place(program), 0
    for one in SETTINGS[program]:
        for number, need in enumerate(one.flag.needs):
            others = fulfilled(program, one) if number else {}
            others |= broken(program, need)
            if "codebook_lr" in others:  # or nothing would be trained
                others["update_codes"] = True
            with pytest.raises(
                UserError, match=rf"^--{one.name}\b.* has no effect with(out)? .*; leave it out$"
            ) as caught:
                build(parser.kind, given | others | {one.name: other_value(one)})
            words = str(caught.value).partition("has no effect")[2]
            assert any(re.search(rf"(--|\b){name}\b", words, re.IGNORECASE) for _, name, _ in parts_of(need))
            assert "\n" not in words
            build(parser.kind, given | others | {one.name: one.default})
            tried += 1
    assert tried or program in ("compare", "generate", "fetch_prompts")


NUMBERS = [(name, one) for name, one in FLAGS if one.kind in (int, float) and not one.flag.choices]


@pytest.mark.parametrize(("program", "one"), NUMBERS, ids=[f"{name}-{one.name}" for name, one in NUMBERS])
def test_numbers_out_of_range_are_one_line_that_names_the_flag_and_what_is_allowed(program, one, capsys):
    parser, words = PROGRAMS[program]
    assert (one.flag.ge, one.flag.gt) != (None, None), "every number has a lowest value"
    for text in bad_values(one):
        assert run_script(parser.parse, [*words, f"--{one.name}={text}"]) == 2
        error = capsys.readouterr().err
        assert f"--{one.name}" in error and text in error and f"allowed are {one.allowed}" in error
        assert error.count("\n") == 1


CHOICES = [(name, one) for name, one in FLAGS if one.flag.choices]


@pytest.mark.parametrize(("program", "one"), CHOICES, ids=[f"{name}-{one.name}" for name, one in CHOICES])
def test_a_value_that_is_no_choice_is_one_line_that_names_the_flag_and_the_choices(program, one, capsys):
    parser, words = PROGRAMS[program]
    for text in ("99", "magic"):
        assert run_script(parser.parse, [*words, f"--{one.name}", text]) == 2
        error = capsys.readouterr().err
        assert f"--{one.name}" in error and text in error and error.count("\n") == 1
        assert all(str(choice) in error for choice in one.flag.choices)


WORDS = [(name, one) for name, one in FLAGS if one.kind is not bool and one.name != "negative_prompt"]


@pytest.mark.parametrize(("program", "one"), WORDS, ids=[f"{name}-{one.name}" for name, one in WORDS])
def test_an_empty_text_is_one_line_that_names_the_flag(program, one, tmp_path, capsys):
    """As from a variable of the shell that is unset."""
    parser, words = PROGRAMS[program]
    (tmp_path / "flags.yaml").write_text(f"{one.name}: ''\n")
    empty = [[f"--{one.name}="], [f"--{one.name}", ""], ["--config", str(tmp_path / "flags.yaml")]]
    for flags in [*empty, [f"--{one.name}", "a", ""]] if one.kind is tuple else empty:
        assert run_script(parser.parse, [*words, *flags]) == 2
        error = capsys.readouterr().err
        assert f"--{one.name}" in error and "the value is empty" in error and error.count("\n") == 1


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_empty_positional_argument_is_one_line(program, capsys):
    parser, words = PROGRAMS[program]
    for k in range(len(words)):
        assert run_script(parser.parse, [*words[:k], "", *words[k + 1 :]]) == 2
        error = capsys.readouterr().err
        assert "the value is empty" in error and error.count("\n") == 1
    assert run_script(parser.parse, [*words, "--config", ""]) == 2
    assert "--config: the value is empty" in capsys.readouterr().err


def test_a_prompt_may_be_empty():
    parser, words = PROGRAMS["generate"]
    assert parser.parse([*words, "--negative_prompt", ""]).negative_prompt == ""


@pytest.mark.parametrize(("program", "one"), FLAGS, ids=[f"{name}-{one.name}" for name, one in FLAGS])
def test_a_misspelt_flag_is_asked_about(program, one, tmp_path):
    """On the command line, with its value behind it or joined to it, and in a --config file."""
    parser, words = PROGRAMS[program]
    names = {*(one.name for name, one in FLAGS if name == program), "loglevel", "config", "help", "help_all"}
    wrong = one.name.replace("_", "") if "_" in one.name else one.name + one.name[-1]
    assert wrong not in names
    (tmp_path / "flags.yaml").write_text(f"{wrong}: 1\n")
    for flags in ([f"--{wrong}"], [f"--{wrong}=1"], [f"--{wrong}", "1"], ["--config", str(tmp_path / "flags.yaml")]):
        with pytest.raises(UserError, match=rf"; did you mean --{one.name}\?") as caught:
            parser.parse([*words, *flags])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("program", "one"), [*NUMBERS, *CHOICES])
def test_settings_from_python_are_checked_as_flags_are(program, one):
    kind = PROGRAMS[program][0].kind
    for value in ("magic", True, None if one.default is not None else "", [1]):
        with pytest.raises(UserError, match=f"^--{one.name} is "):
            build(kind, given_by_place(program) | {"update_codes": True, one.name: value})


def help_of(parser, flag, capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        parser.parse([flag])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_short_and_help_all_is_whole(program, capsys):
    parser, _ = PROGRAMS[program]
    short, whole = (help_of(parser, flag, capsys) for flag in ("--help", "--help_all"))
    assert help_of(parser, "-h", capsys) == short
    assert len(short.splitlines()) <= 40 and max(map(len, whole.splitlines())) <= 120
    assert "--help_all" in short and "show all flags" in short
    listed = [line for line in short.splitlines() if line.startswith(("  -", "  --")) and "help" not in line]
    assert len(listed) <= 14
    for one in SETTINGS[program]:
        name = one.flag.metavar or one.name.upper() if one.flag.positional else f"--{one.name}"
        line = re.compile(rf"^  {name}\b", re.MULTILINE)
        assert line.search(whole) and bool(line.search(short)) == (one.flag.common or one.flag.positional), name
    assert "--use_faiss" not in whole


@pytest.mark.parametrize("program", PROGRAMS)
def test_unsupported_flags_are_not_flags(program):
    """A flag of the original that is refused is not one that exists, nor does a config file take it."""
    parser, words = PROGRAMS[program]
    names = {option for one in parser._actions for option in one.option_strings if one.dest == "==SUPPRESS=="}
    assert not names & {f"--{one.name}" for one in SETTINGS[program]}
    for name in names:
        with pytest.raises(UserError, match=f"{name} is not a flag here: "):
            parser.parse([*words, name, "1"])


def test_a_config_file_is_forgotten_after_its_run(tmp_path):
    path = tmp_path / "flags.yaml"
    path.write_text("seed: 9\nwandb: true\n")
    with pytest.raises(UserError, match="no such flag: 'wandb'"):
        config_of("--config", str(path))
    path.write_text("seed: 9\nreport_to: wandb\nnum_codebooks: 2\n")
    before = config_of()
    assert config_of("--config", str(path)).report_to == "wandb"
    assert config_of() == before


# ------------------------------------------------------------------------------------------- quantization's flags


def test_every_flag_reaches_the_settings():
    config = config_of(
        *shlex.split("--num_codebooks 2 --nbits_per_codebook 6 --in_group_size 4 --scale_nbits 3 --no-group_channels"),
        *shlex.split("--encoder beam --beam_size 3 --lr 0.01 --guidance_scale 0 --seed 5 --save out/x"),
        *shlex.split("--wandb --dry_run"),
    )
    assert (config.spec.num_codebooks, config.spec.nbits_per_codebook, config.spec.in_group_size) == (2, 6, 4)
    assert (config.spec.scale_nbits, config.spec.group_channels) == (3, False)
    assert (config.solver.encoder, config.solver.beam_size, config.solver.lr) == ("beam", 3, 0.01)
    assert (config.sampling.guidance_scale, config.seed, config.output_dir) == (0.0, 5, "out/x")
    assert (config.report_to, config.dry_run, config.resume) == ("wandb", True, False)


@pytest.mark.parametrize("program", ["main_text2image", "finetune"])
def test_no_more_image_pairs_are_shown_than_are_evaluated(program):
    parser, words = PROGRAMS[program]
    for flags, shown in (("", 16), ("--evaluation_nsamples 2", 2), ("--evaluation_nsamples 99", 16)):
        assert parser.parse([*words, *flags.split()]).visualize_nsamples == shown
    assert parser.parse([*words, "--visualize_nsamples", "0"]).visualize_nsamples == 0
    with pytest.raises(UserError, match="--visualize_nsamples 3 is more than --evaluation_nsamples 2"):
        parser.parse([*words, "--visualize_nsamples", "3", "--evaluation_nsamples", "2"])


def test_spellings_of_the_original_work():
    config = config_of("--scheduler", "DDPM", "--loglevel", "warn", "--save", "x", "--rest_nbits", "8")
    assert (config.sampling.scheduler, config.output_dir, config.unquantized_nbits) == ("ddpm", "x", 8)
    assert logging.getLogger().level == logging.WARNING


def test_config_file_lies_beneath_the_flags(tmp_path):
    path = tmp_path / "flags.yaml"
    path.write_text("num_codebooks: 5\nseed: 9\nresume: true\nencoder: beam\nlr: 1e-3\n")
    config = config_of("--config", str(path), "--seed", "2")
    assert (config.spec.num_codebooks, config.seed, config.resume, config.solver.lr) == (5, 2, True, 0.001)


def test_flags_that_share_a_name_take_a_value_from_the_config_file(tmp_path):
    path = tmp_path / "flags.yaml"
    path.write_text("report_to: tensorboard\n")
    assert config_of("--config", str(path)).report_to == "tensorboard"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("colour: 1", "no such flag: 'colour'"),
        ("seed: many", "'many' is not a whole number"),
        ("resume: 3", "allowed are true and false"),
        ("encoder: magic", "invalid choice"),
        ("- 1", "must hold a mapping"),
        ("a: [", "cannot be read"),
        ("variant:", "variant is None; expected a value"),
        ("seed: [1]", r"seed is \[1\]; expected a value"),
        ("seed: 0x" + "f" * 6000, "seed is a number too long to print"),
        ("encoder: --", "encoder is '--'"),
        ("seed: !!bool perhaps", "cannot be read"),
        ("[" * 9999, "nested too deeply"),
        ("seed: 1\nheight: 8\nseed: 2", "cannot be read: line 3: 'seed' appears twice"),
        ("seed: 1\n  height: 8", "cannot be read: line 2: "),
        ("rest_nbits: 8\nunquantized_nbits: 8", "unquantized_nbits is given under two names"),
        ("help: true", "no such flag: 'help'"),
        ("devices: 1", "no such flag: 'devices'"),
        ("revision: 1.10", "revision is 1.1, which YAML does not take for text; put it in quotes"),
        ("variant: no", "variant is False, which YAML does not take for text"),
        ("seed: 1\noutput_dir: caf\xe9".encode("latin-1"), "line 2: byte 0xe9 is not UTF-8; save it as UTF-8"),
    ],
)
def test_bad_config_files(tmp_path, text, words):
    path = tmp_path / "flags.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=words):
        config_of("--config", str(path))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num_codebooks 0", "--num_codebooks: 0 is out of range; allowed are whole numbers from 1 to 16"),
        ("--nbits_per_codebook 17", "from 1 to 16"),
        ("--nbits_per_codebook two", "'two' is not a whole number"),
        ("--scale_nbits 12", "--scale_nbits: invalid choice: 12"),
        ("--codebook_value_nbits 9", "--codebook_value_nbits: invalid choice: 9"),
        ("--codebook_value_nbits 4 --codebook_value_num_groups 7", "--codebook_value_num_groups is 7"),
        ("--lr 1", "--lr: 1 is out of range; allowed are numbers from 0 to below 1"),
        ("--lr nan", "out of range"),
        ("--encoder fast", "invalid choice: 'fast'"),
        ("--num_codebook 2", r"unrecognized arguments: --num_codebook 2; did you mean --num_codebooks\? \(see"),
        ("--zzzzzzz", r"unrecognized arguments: --zzzzzzz \(see"),
        ("--min_timestep 600 --max_timestep 500", "--min_timestep 600.0 is above --max_timestep 500.0"),
        ("--visualize_nsamples 50", "--visualize_nsamples 50 is more than"),
        ("--overrides nowhere.json", "--overrides nowhere.json cannot be read"),
        ("--height 64", "--height and --width are given together"),
        ("--devices 0", "--devices is not a flag here: choose GPUs with CUDA_VISIBLE_DEVICES"),
        ("--finetune_keep_best", "--finetune_keep_best is not a flag here: finetune.py has it"),
        ("--use_faiss", "--use_faiss is not a flag here"),
    ],
)
def test_bad_flags_say_which_and_what_is_allowed(flags, words):
    with pytest.raises(UserError, match=words) as caught:
        config_of(*flags.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("[1]", "must map"),
        ('{"a": 3}', "expected null"),
        ('{"a": {"x": 1}}', "settings out of"),
        ('{"(": null}', "regular"),
        ('{"a": null, ".*to_q": {"row_bits": 16}}', r"--overrides \.\*to_q: row_bits is 16, but .* use --target_bits"),
        ('{"a": {"num_codebooks": 1, "shared_codebooks": "unet", "row_bits": "x"}}', "or segment_bits as in its plan"),
        ('{\n"a": null,\n"a": {"num_codebooks": 2}\n}', "names 'a' twice"),
        ('{\n"a": null\n"b": null}', "line 3, column 1: "),
        (b'{\n"caf\xe9": null}', "line 2: byte 0xe9 is not UTF-8; save it as UTF-8"),
    ],
)
def test_bad_overrides(tmp_path, plan, words):
    path = tmp_path / "plan.json"
    path.write_bytes(plan if isinstance(plan, bytes) else plan.encode())
    with pytest.raises(UserError, match=words) as caught:
        config_of("--overrides", str(path))
    assert "\n" not in str(caught.value)


def test_a_plan_of_constant_rate_from_before_trellis_codes_is_taken(tmp_path):
    (tmp_path / "plan.json").write_text('{"a": {"num_codebooks": 2, "row_bits": 0}}')
    assert config_of("--overrides", str(tmp_path / "plan.json")).overrides["a"]["row_bits"] == 0


@pytest.mark.parametrize("text", ['{\n\t"a": null\n}', '\ufeff{"a": null}'])
def test_overrides_as_editors_write_them(tmp_path, text):
    for encoding in ("utf-8", "utf-16"):
        (tmp_path / "plan.json").write_text(text.lstrip("\ufeff") if encoding == "utf-16" else text, encoding)
        assert config_of("--overrides", str(tmp_path / "plan.json")).overrides == {"a": None}


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--variant fp16 --revision x --dtype bfloat16 --local_files_only --height 64 --width 64",
        "--single_file_config a/b",
    ],
)
def test_the_next_command_is_one_that_generate_takes(flags):
    words = ["my model's", "c.txt", "e $HOME.txt", "--output_dir", "out/a b/", "--guidance_scale", "3", *flags.split()]
    config = main_text2image.PARSER.parse(words)
    program, script, *told = shlex.split(generate_command(config, config.evaluation_prompts))
    assert (program, script) == ("python", "generate.py")
    then = generate.PARSER.parse(told)
    assert (then.model, then.quantized, then.prompts) == ("my model's", "out/a b/", "e $HOME.txt")
    assert then.output_dir == "out/a b-images"
    for name in ("variant", "single_file_config", "revision", "dtype", "device", "local_files_only", "sampling"):
        assert getattr(then, name) == getattr(config, name)


def test_on_save_must_be_a_command():
    with pytest.raises(UserError, match="--on_save"):
        config_of("--on_save", "echo 'unclosed")


@pytest.mark.parametrize("program", ["nosuchcmd", "./nosuchcmd", "plain.txt"])
def test_on_save_must_be_a_program_that_is_there(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.txt").write_text("no program")
    with pytest.raises(UserError, match=f"^--on_save {program} is not found") as caught:
        config_of("--on_save", f"{program} {{path}}")
    assert "\n" not in str(caught.value)
    assert config_of("--on_save", "{path}/run.sh").on_save and config_of("--on_save", "ls {path}").on_save


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("--x is 1"), 2),
        (RunError("layer y\nmore"), 1),
        (OSError(28, "No space left"), 1),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("oops"), 1),
    ],
)
def test_errors_are_one_line_and_a_status(capsys, error, status):
    def fail(_):
        raise error

    assert run_script(fail) == status
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert "Traceback" not in captured.err + captured.out


# ------------------------------------------------------------------------------------------- logs of libraries

LONG = "a big red circle " * 20


def output(capfd, work, level="INFO") -> str:
    """What a program prints whose main function is `work`."""

    def main(_):
        logging.getLogger().setLevel(level)
        work()

    capfd.readouterr()
    assert run_script(main) == 0
    said = capfd.readouterr()
    assert said.err == ""
    return said.out


def test_warnings_are_a_line_without_a_path(capfd):
    out = output(
        capfd, lambda: warnings.warn("two\nlines of /x/lib/site-packages/torch/a.py", UserWarning, stacklevel=1)
    )
    assert out == "warning: two lines of torch/a.py\n"


@pytest.mark.parametrize("kind", [DeprecationWarning, FutureWarning])
def test_what_is_meant_for_developers_is_at_debug(capfd, kind):
    def warn():
        warnings.simplefilter("always")
        warnings.warn("old", kind, stacklevel=1)

    assert output(capfd, warn) == ""
    assert "old" in output(capfd, warn, "DEBUG")


@pytest.mark.parametrize("library", [diffusers, transformers])
def test_loggers_of_libraries(capfd, library):
    logger = library.utils.logging.get_logger(f"{library.__name__}.x")
    assert output(capfd, lambda: logger.warning("a\n b")) == "warning: a b\n"
    assert output(capfd, lambda: logging.getLogger("httpx").info("HTTP Request: GET")) == ""
    root = logging.getLogger(library.__name__)  # outside of programs they keep their handlers
    assert root.handlers and not root.propagate


def test_our_own_lines_stay_as_they_are(capfd):
    assert output(capfd, lambda: logging.getLogger("vqdm").info("a\n  b")) == "a\n  b\n"


def test_other_processes_leave_warnings_to_the_first(capfd, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert output(capfd, lambda: warnings.warn("x", stacklevel=1)) == ""


def test_a_16_bit_pipeline_moves_to_the_cpu_without_a_warning(capfd):
    pipeline = tiny_pipeline("sd15")
    assert output(capfd, lambda: pipeline.to("cpu", torch.float16) and pipeline.to("cpu")) == ""


def test_not_a_number_in_an_image_is_not_warned_of_by_numpy(capfd):
    assert output(capfd, lambda: np.array([np.nan]).astype(np.uint8)) == ""


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_long_prompts_are_one_line(capfd, family):
    pipeline = tiny_pipeline(family)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a small star", LONG, "a heart", LONG + "on a heart"]

    def work():
        log_truncated(pipeline, [*prompts, *prompts])
        for prompt in prompts:
            pipeline(prompt, num_inference_steps=1, output_type="latent")

    (line,) = output(capfd, work).splitlines()
    assert line.startswith("warning: 2 of 4 prompts are longer than the 24 tokens that a text encoder reads")
    assert f"the first begins '{LONG[:40]}" in line


def test_prompts_that_fit_are_not_mentioned(capfd):
    pipeline = tiny_pipeline("sdxl")
    assert output(capfd, lambda: log_truncated(pipeline, ["", "a heart"])) == ""
    assert output(capfd, lambda: log_truncated(pipeline, [])) == ""
