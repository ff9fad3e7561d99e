"""What a node measures of itself: where its time goes (`spans`), the FLOPs of its steps (`flops`) on its device
(`devices`), and the trace of single steps (`trace_file`). `node.worker.meter` makes figures of it."""
