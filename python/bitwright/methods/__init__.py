"""Methods: functions from a weight matrix and its input statistics to a `QuantizedTensor`."""
