"""What a runner does on data: scores, times, sizes, and the statistics of their differences."""
