"""Modules of tools.report: loading runs, grouping them into variants, tables, figures."""
