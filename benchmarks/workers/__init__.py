"""Fresh processes that the benchmarks start; each prints one JSON object on its last line."""
