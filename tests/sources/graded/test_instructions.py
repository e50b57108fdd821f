"""Instructions: the answer satisfies every constraint, each wrong choice violates exactly one."""

from stages.corpus.readings import satisfies
from stages.sources.graded.instructions import PHRASES
from tests.graded import dataset, write


def test_the_answer_violates_no_constraint_and_each_wrong_choice_one(tmp_path):
    rows = write(dataset("instructions", test=40), tmp_path)["test"]
    for item in rows.itertuples():
        violated = [
            sum(not satisfies(choice, constraint) for constraint in item.constraints)
            for choice in item.choices
        ]
        assert sorted(violated) == [0, 1, 1, 1]
        for constraint in item.constraints:
            kind, argument = constraint.split()
            assert PHRASES[kind].format(argument) in item.question
    kinds = {constraint.split()[0] for constraints in rows["constraints"] for constraint in constraints}
    assert kinds == set(PHRASES)
