import hashlib

from vqdm.storage.fingerprint import PIECE_BYTES, file_sha256, folder_fingerprint, pipeline_fingerprint


def test_file_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_every_part_of_a_component_counts(tmp_path):
    weights = bytearray(20 * PIECE_BYTES)
    seen = set()
    for step in range(5):
        if step == 2:
            weights[0] = 1
        if step == 3:
            weights[-1] = 1
        (tmp_path / "config.json").write_text(f'{{"a": {min(step, 1)}}}')
        (tmp_path / "model.safetensors").write_bytes(weights if step < 4 else weights + b"x")
        seen.add(folder_fingerprint(tmp_path))
    assert len(seen) == 5
    (tmp_path / "picture.png").write_bytes(b"x")
    assert folder_fingerprint(tmp_path) in seen


def test_pipeline_counts_its_components_and_nothing_else(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    (tmp_path / "model_index.json").write_text('{"_class_name": "X", "unet": ["diffusers", "U"], "gone": [null, null]}')
    before = pipeline_fingerprint(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "run.json").write_text("{}")
    assert pipeline_fingerprint(tmp_path) == before
    (tmp_path / "unet" / "config.json").write_text('{"a": 1}')
    assert pipeline_fingerprint(tmp_path) != before
