// All kernels, as one program.
#include "common.cuh"

#include "place.cuh"

#include "quantized.cuh"

#include "ffn.cuh"

#include "skinny.cuh"

#include "rows.cuh"

#include "quantized_few.cuh"

#include "decode.cuh"

#include "fused.cuh"

#include "stack.cuh"

#include "stack_one.cuh"

#include "prefill.cuh"

#include "pruned.cuh"

#include "compact.cuh"

#include "gaze.cuh"

#include "sample.cuh"
