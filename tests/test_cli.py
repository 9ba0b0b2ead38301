import shlex

import generate
import pytest
from main_text2image import build_parser, to_config

from vqdm.cli import run_script
from vqdm.config import generate_command
from vqdm.errors import RunError, UserError

BASIC = ["model", "calibration.txt", "evaluation.txt"]


def config_of(*flags):
    return to_config(vars(build_parser().parse([*BASIC, *flags])))


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


def test_spellings_of_the_original_work():
    options = build_parser().parse([*BASIC, "--scheduler", "DDPM", "--loglevel", "warn", "--save", "x"])
    assert (options.scheduler, options.loglevel, options.output_dir) == ("ddpm", "WARNING", "x")


def test_config_file_lies_beneath_the_flags(tmp_path):
    path = tmp_path / "flags.yaml"
    path.write_text("num_codebooks: 5\nseed: 9\nresume: true\nlr: 1e-3\n")
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
        ("seed: 0x" + "f" * 6000, "seed is a int too long to print"),
        ("encoder: --", "encoder is '--'"),
        ("seed: !!bool perhaps", "cannot be read"),
        ("[" * 9999, "nested too deeply"),
        ("seed: 1\nheight: 8\nseed: 2", "cannot be read: line 3: 'seed' appears twice"),
        ("seed: 1\n  height: 8", "cannot be read: line 2: "),
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
        ("--scale_nbits 12", "--scale_nbits is 12"),
        ("--codebook_value_nbits 9", "--codebook_value_nbits is 9"),
        ("--codebook_value_nbits 4 --codebook_value_num_groups 7", "--codebook_value_num_groups is 7"),
        ("--lr 1", "--lr is 1.0"),
        ("--lr nan", "out of range"),
        ("--encoder fast", "invalid choice: 'fast'"),
        ("--num_codebook 2", "unrecognized arguments"),
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
    with pytest.raises(UserError, match=words.replace("(", r"\(")) as caught:
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
    "flags", ["", "--variant fp16 --revision x --dtype bfloat16 --local_files_only --height 64 --width 64"]
)
def test_the_next_command_is_one_that_generate_takes(flags):
    words = ["my model's", "c.txt", "e $HOME.txt", "--output_dir", "out/a b/", "--guidance_scale", "3", *flags.split()]
    config = to_config(vars(build_parser().parse(words)))
    program, script, *told = shlex.split(generate_command(config, config.evaluation_prompts))
    assert (program, script) == ("python", "generate.py")
    then = generate.to_config(vars(generate.build_parser().parse(told)))
    assert (then.model, then.quantized, then.prompts) == ("my model's", "out/a b/", "e $HOME.txt")
    assert then.output_dir == "out/a b-images"
    for name in ("variant", "revision", "dtype", "device", "local_files_only", "sampling"):
        assert getattr(then, name) == getattr(config, name)


def test_on_save_must_be_a_command():
    with pytest.raises(UserError, match="--on_save"):
        config_of("--on_save", "echo 'unclosed")


def test_help_reads(capsys):
    with pytest.raises(SystemExit) as caught:
        build_parser().parse(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert "--num_codebooks" in text and "(default: 3)" in text and "--use_faiss" not in text
    assert max(map(len, text.splitlines())) <= 120


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
