"""What params.yaml no longer names moves away, and what it names stays."""

from pathlib import Path

from stages.tidy import tidy

NAMED = {"data/results/base/m/news/scores.parquet", "data/profile/base/m/profile.json", "data/profile/none"}
OTHER = {"data/results/prune/p/news/scores.parquet", "data/profile/prune/p/profile.json"}


def test_results_and_profiles_without_a_recipe_move_to_removed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NAMED | OTHER:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    tidy(["base/m/news"], ["base/m"])
    mark = Path("data/tidied.json").read_bytes()
    assert {str(file) for file in Path("data").rglob("*") if file.is_file()} == NAMED | {
        "data/tidied.json", "data/removed/prune/p/news/scores.parquet",
        "data/removed/profile/prune/p/profile.json",
    }  # fmt: skip
    tidy(["base/m/news"], ["base/m"])
    assert Path("data/tidied.json").read_bytes() == mark
