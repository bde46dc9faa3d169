"""The paper's other experiments, one folder each: to start one of your own, copy a folder."""
