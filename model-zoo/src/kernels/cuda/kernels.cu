// All kernels, as one program.
#include "common.cuh"

#include "place.cuh"

#include "skinny.cuh"

#include "rows.cuh"

#include "decode.cuh"

#include "fused.cuh"

#include "stack.cuh"

#include "prefill.cuh"

#include "sample.cuh"
