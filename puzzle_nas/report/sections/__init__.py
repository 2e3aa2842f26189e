"""The sections of report.html, each a function from a run's facts to HTML."""
