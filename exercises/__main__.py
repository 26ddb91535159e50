"""Exercises: write the missing bodies of a module, and grade them.

python -m exercises masks                       write answers/masks.py: masks.py with holes
python answers/masks.py                         run it
python -m pytest --exercise masks.may_attend    grade one function
python -m pytest --exercise masks               grade them all
python -m exercises --hint masks.may_attend 2   print a hint; 1, 2, 3: each tells more
python -m exercises --list                      all exercises and your points
python -m exercises --film                      a film by your answers

For instructors:

python -m exercises --handout ../course         copy the project without solutions
python -m exercises --grade submissions         grade a folder for each student
python -m exercises --zip autograder.zip        the same for Gradescope
python -m exercises --check                     compare table, modules and tests
"""

import os

from exercises import classroom, coursework, handout, reward
from plumbing import cli


def main():
    p = cli.parser(__doc__)
    p.add_argument("name", nargs="?", help="exercise to start, or to grade")
    p.add_argument("--force", action="store_true", help="start again: overwrite your work")
    p.add_argument("--list", action="store_true", help="print all exercises and your progress")
    p.add_argument("--all", action="store_true", help="start all unstarted exercises")
    p.add_argument("--hint", nargs="+", metavar="NAME.function", help="print a hint of depth 1-3")
    about = "write a film made by your answers, and compare it with the right one"
    p.add_argument("--film", action="store_true", help=about)
    about = "copy the project without the solutions of NAME and of all later exercises"
    p.add_argument("--handout", metavar="FOLDER", help=about)
    about = "grade FOLDER/STUDENT/NAME.py of every student, or only exercise NAME"
    p.add_argument("--grade", metavar="FOLDER", help=about)
    about = "limit of time for each test"
    p.add_argument("--seconds", type=cli.real(1, 3600), default=classroom.SECONDS, help=about)
    p.add_argument("--zip", metavar="FILE", help="write an autograder for Gradescope")
    p.add_argument("--check", action="store_true", help="compare table, modules and tests")
    args, names = p.parse_args(), list(coursework.EXERCISES)
    if args.hint:
        if len(args.hint) > 2:
            raise ValueError(f"--hint {' '.join(args.hint)}: expected one depth")
        print(coursework.hint(*args.hint))
    elif args.check:
        if found := [line for name in names for line in coursework.problems(name)]:
            raise ValueError("; ".join(found))
        print(f"{len(names)} exercises: table, modules and tests agree")
    elif args.handout:
        first = args.name or names[0]
        handout.hand_out(args.handout, first)
        print(f"wrote {args.handout}: {first} and all later exercises are blank")
    elif args.zip:
        handout.zip_autograder(args.zip)
        print(f"wrote {args.zip}")
    elif args.grade:
        scores = classroom.grade_class(args.grade, args.name, args.seconds)
        print(f"{classroom.table(scores)}\nwrote {args.grade}/scores.csv")
        if "GITHUB_ACTIONS" in os.environ:
            print(*map(classroom.notices, scores.values()), sep="\n")
    elif args.film:
        print(reward.report())
    elif args.list or not (args.name or args.all):
        print(coursework.overview())
    else:
        unstarted = [name for name in names if coursework.progress(name) == "not started"]
        for name in [args.name] if args.name else unstarted:
            answer = coursework.shown(coursework.start(name, args.force))
            print(f"wrote {answer}; grade it: python -m pytest --exercise {name}")


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
