"""Tables of families and of scores by capability, from the forms that their recorders write."""

from ultralong.bench.training.tables import curves_table, families_table, refused_table


def test_a_familys_row_has_an_error_for_each_scheme():
    errors = {"float64_gradient": 4.4e-16, "float32_fsdp_gradient": 3.6e-7}
    rows = [{"family": "Mistral", "scheme": scheme} | errors for scheme in ("gathered", "ulysses")]
    rows.append(rows[0] | {"scheme": "ring", "float64_gradient": 1e-9})
    recorded = [{"rows": rows, "refused": {"Phi": "a head with a bias"}}]
    cell = "4e-16, 4e-07"
    assert families_table(recorded)[2:] == [f"| Mistral | 1e-09, 4e-07 | {cell} | {cell} |"]
    assert refused_table(recorded)[2:] == ["| Phi | a head with a bias |"]


def test_a_curve_has_a_cell_for_each_length_that_was_asked():
    cell = {"capability": "multi-hop", "length": 1024, "tasks": 2, "n": 4, "score": 25.0, "low": 4.6, "high": 69.9}
    area = {"capability": "multi-hop", "first": 1024, "last": 4096, "score": 12.5, "low": 1.0, "high": 41.0}
    before = {"capabilities": [cell, cell | {"length": 4096, "score": 0.0, "low": None, "high": None}], "areas": [area]}
    after = {"capabilities": [cell | {"length": 8192}], "areas": []}
    assert curves_table([{"runs": {"before": before, "rescaled": after}}]) == [
        "| run | capability | samples | 1,024 | 4,096 | 8,192 | area under the curve |",
        "|---|---|---|---|---|---|---|",
        "| before | multi-hop | 8 | 25 (5 to 70) | 0 |  | 12 (1 to 41) |",
        "| rescaled | multi-hop | 4 |  |  | 25 (5 to 70) |  |",
    ]
