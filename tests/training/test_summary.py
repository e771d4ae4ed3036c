"""What a run says about its evaluations, also of evaluators that give no accuracy."""

from ssl_bench.records.summary import summary
from ssl_bench.training.session import _at_chance

KNN = {"protocol": "knn-v1", "model": "trained", "metrics": {"top1": 10.5, "n_test": 400}, "n_test": 400, "chance": 10}
SPREAD = {"protocol": "spread-v1", "model": "trained", "metrics": {"spread": 0.12345}, "n_test": 400, "chance": 10}


def test_a_result_without_top1_is_shown_by_its_numbers():
    lines = summary({"status": "finished", "evaluations": [KNN, SPREAD]})
    assert [line.split() for line in lines] == [
        ["knn-v1", "trained", "top-1", "10.50%", "of", "400"],
        ["spread-v1", "trained", "spread", "0.1235", "of", "400"],
    ]


def test_a_result_without_top1_says_nothing_about_chance():
    assert _at_chance([KNN, SPREAD])
    assert not _at_chance([{**KNN, "metrics": {"top1": 60.0}}, SPREAD])
    assert not _at_chance([SPREAD])


def test_label_free_numbers_are_of_the_train_images_that_were_looked_at():
    rank = {"protocol": "alignment-uniformity-v1", "model": "trained", "metrics": {"rankme": 12.5, "n_images": 60}}
    lines = summary({"status": "finished", "evaluations": [KNN, {**rank, "n_test": 400}]})
    assert lines[1].split() == ["alignment-uniformity-v1", "trained", "rankme", "12.5", "of", "60"]
    assert lines[0].index("trained") == lines[1].index("trained")
