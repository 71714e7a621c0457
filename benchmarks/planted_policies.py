"""Does the comparison find a weak policy, and does it leave a copy alone? 500 simulated evaluations of each.

python benchmarks/planted_policies.py
python benchmarks/planted_policies.py --episodes-per-task 10 --weak-rate 0.6
"""

import argparse

from wallvla.evaluation.statistics import planted_study, trials_to_tell_apart


def main() -> None:
    """Prints the rates of the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=500)
    parser.add_argument("--tasks", type=int, default=3)
    parser.add_argument("--episodes-per-task", type=int, default=50)
    parser.add_argument("--rate", type=float, default=0.9, help="success rate of the original and its copy")
    parser.add_argument("--weak-rate", type=float, default=0.75, help="success rate of the weak policy")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args())
    result = planted_study(**options)
    print(f"{result['trials']} trials each, {result['simulations']} simulations, level {result['level']:.0%}")
    for name, meaning in (
        ("weak", f"weak policy ({options['weak_rate']:.0%} against {options['rate']:.0%}), same scenes, found"),
        ("copy", "copy, same scenes, wrongly called different"),
        ("weak_unpaired", "weak policy, other scenes, found"),
        ("copy_unpaired", "copy, other scenes, wrongly called different"),
    ):
        entry = result[name]
        print(f"  {meaning}: {entry['rate']:.1%} [{entry['low']:.1%}, {entry['high']:.1%}]")
    needed = trials_to_tell_apart(options["rate"], options["weak_rate"])
    print(f"  independent trials that this difference needs: {needed} each")


if __name__ == "__main__":
    main()
