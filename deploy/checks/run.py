"""Runs every check of deploy/ and says what is wrong with what; exit status 1 if anything is."""

import sys
import time

import charts
import dashboards
import objects
import services

CHECKS = [
    services.yaml_is_tidy,
    services.rules_hold,
    services.unit_is_sound,
    services.containers_are_sound,
    charts.chart_lints,
    charts.chart_refuses_bad_values,
    charts.chart_and_manifests_agree,
    objects.objects_are_valid,
    objects.references_lead_somewhere,
    objects.drain_fits_grace,
    objects.endpoint_picker_is_wired,
    dashboards.dashboard_is_sound,
]


def main() -> int:
    failed = 0
    for check in CHECKS:
        start = time.monotonic()
        problems = list(check())
        took = time.monotonic() - start
        print(f"{'ok  ' if not problems else 'FAIL'} {check.__name__.replace('_', ' ')} ({took:.1f} s)")
        for problem in problems:
            print("     " + problem.strip().replace("\n", "\n     "))
        failed += bool(problems)
    return 1 if failed else 0


sys.exit(main())
