"""Which child: costs, limits, the search's tables, candidates that are measured, the frontier."""
