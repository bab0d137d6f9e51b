// Quantized weights (GGUF's formats) as products take them: codes of four, six or eight bits, which scales, and of some
// formats minima, of 32 or 16 columns turn into weights.
//
// A matrix lies in units of sixteen rows and 64 columns, all of a tile of rows before those of the next. A unit is the
// scales, a sixteen of bytes for rows g and g + 8, then the codes' low four bits, a sixteen of bytes for each lane, then
// their high bits, as many for each lane as there are. Lane (g, t) has what it needs of rows g and g + 8: of each 32 columns
// eight from 8 t on, four of one operand of the tensor cores and four of the next. Of an operand's word, bits 4 i and
// 16 + 4 i on are the low bits of its i-th pair.
#pragma once
#include "common.cuh"

// How weights lie in memory. Affine ones are scale * code + minimum, the scale in the low half of a word, a word for 32
// columns; all others are scale * (code - middle). Fine ones have a scale for each sixteen columns, two in a word.
enum WeightFormat : uint32_t { WEIGHT_BF16, WEIGHT_AFFINE4, WEIGHT_AFFINE6, WEIGHT_FINE6, WEIGHT_SYMMETRIC8 };

constexpr uint32_t UNIT_SCALES = 128, UNIT_LOW = 512;
DEVICE constexpr uint32_t unit_high(uint32_t format) {
    return format == WEIGHT_SYMMETRIC8 ? 512 : format == WEIGHT_AFFINE4 ? 0 : 256;
}
DEVICE constexpr uint32_t unit_bytes(uint32_t format) { return UNIT_SCALES + UNIT_LOW + unit_high(format); }

// Rows of a matrix of one format.
struct QuantizedPart {
    const unsigned char *units;
    uint32_t first_row, format;
};

// A matrix of up to three formats; none at all where it lies in bf16.
struct QuantizedMatrix {
    QuantizedPart parts[3];
    uint32_t count, pad;

    DEVICE const QuantizedPart &part(uint32_t row) const {
        return parts[count > 2 && row >= parts[2].first_row ? 2 : count > 1 && row >= parts[1].first_row ? 1 : 0];
    }
};

DEVICE uint32_t units_of(uint32_t cols) { return (cols + 63) / 64; }
// Where the units of the tile of sixteen rows from `row` on begin.
DEVICE const unsigned char *tile_units(const QuantizedPart &part, uint32_t row, uint32_t units) {
    return part.units + static_cast<size_t>((row - part.first_row) / 16) * units * unit_bytes(part.format);
}

// A lane's share of a unit.
template <uint32_t FORMAT>
struct QuantizedUnit {
    static constexpr uint32_t OWN = FORMAT;
    static constexpr bool AFFINE = FORMAT == WEIGHT_AFFINE4 || FORMAT == WEIGHT_AFFINE6, FINE = FORMAT == WEIGHT_FINE6;
    // What pairs() leaves in the codes: it is taken off where sums of activations are.
    static constexpr float BIAS = AFFINE ? 128.0f : 0.0f;

    uint4 scales, low, high;

    // `load` brings sixteen bytes.
    template <class Load>
    DEVICE void fetch(const unsigned char *unit, Load load16) {
        const uint32_t lane = threadIdx.x % 32;
        scales = load16(unit + lane / 4 * 16);
        low = load16(unit + UNIT_SCALES + lane * 16);
        if constexpr (FORMAT == WEIGHT_SYMMETRIC8) high = load16(unit + UNIT_SCALES + UNIT_LOW + lane * 16);
        if constexpr (unit_high(FORMAT) == 256) {
            // Two lanes' bits lie in a sixteen of bytes.
            const uint4 both = load16(unit + UNIT_SCALES + UNIT_LOW + lane / 2 * 16);
            high.x = lane % 2 == 0 ? both.x : both.z, high.y = lane % 2 == 0 ? both.y : both.w;
        }
    }

    // An operand, as whole numbers: codes and BIAS, or where there is none codes less their middle.
    DEVICE void pairs(uint32_t (&w)[4], uint32_t group) const {
        constexpr uint32_t NIBBLES = 0x000F000Fu, PLUS_128 = 0x43004300u;
        const uint32_t word = word_of(low, group);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            w[i] = and_or(word >> 4 * i, NIBBLES, PLUS_128);
            if constexpr (unit_high(FORMAT) == 256) {
                const uint32_t bits = group < 2 ? high.x : high.y, at = 2 * (group % 2 * 4 + i);
                w[i] = and_or(at < 4 ? bits << (4 - at) : bits >> (at - 4), 0x00300030u, w[i]);
                if constexpr (FINE) w[i] = add_pairs(w[i], 0xC320C320u);  // less 160
            }
            if constexpr (FORMAT == WEIGHT_SYMMETRIC8) {
                const uint32_t sixteens = and_or(word_of(high, group) >> 4 * i, NIBBLES, 0x45004500u);  // and 2,048
                w[i] = add_pairs(add_pairs(sixteens, 0xC510C510u), w[i]);  // less 2,304
            }
        }
    }

    // Of the lane's columns of 32, in row g or g + 8: scale, and minimum.
    DEVICE float2 scale(uint32_t block, bool second) const {
        const uint32_t word = word_of(scales, block + (second ? 2 : 0));
        const float factor = half_to_float(FINE && threadIdx.x % 4 >= 2 ? word >> 16 : word);
        return make_float2(factor, AFFINE ? half_to_float(word >> 16) : 0.0f);
    }

    // The two operands of 32 columns as weights, rounded to bf16.
    DEVICE void weights(uint32_t (&w)[2][4], uint32_t block) const {
        // Codes about zero: so little is left of the minimum that its rounding does not count.
        constexpr float MIDDLE = FORMAT == WEIGHT_AFFINE4 ? 8.0f : FORMAT == WEIGHT_AFFINE6 ? 16.0f : 0.0f;
        const float2 near = scale(block, false), far = scale(block, true);
        const uint32_t factors[2] = {pack(near.x, near.x), pack(far.x, far.x)};
        const float rest[2] = {near.y + MIDDLE * near.x, far.y + MIDDLE * far.x};
        const uint32_t minima[2] = {pack(rest[0], rest[0]), pack(rest[1], rest[1])};
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            pairs(w[half], 2 * block + half);
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                uint32_t &pair = w[half][i];
                if constexpr (AFFINE) pair = add_pairs(pair, FORMAT == WEIGHT_AFFINE4 ? 0xC308C308u : 0xC310C310u);
                pair = fma_pairs(pair, factors[i % 2], minima[i % 2]);
            }
        }
    }

    // sums[tile] += the unit times activations: `x(tile, column)` gives eight columns of the lane's token in a tile of eight.
    // Of one tile codes are multiplied, and their sums are scaled, where a scale is 32 columns'; of more that would take longer
    // than to scale the codes.
    template <uint32_t TILES, class Load>
    DEVICE void multiply(float (&sums)[TILES][4], Load x) const {
        const uint32_t t = threadIdx.x % 4;
#pragma unroll
        for (uint32_t block = 0; block < 2; block++) {
            if constexpr (TILES == 1 && !FINE) {
                multiply_codes(sums[0], x(0u, 32 * block + 8 * t), block);
            } else {
                uint32_t w[2][4];
                weights(w, block);
#pragma unroll
                for (uint32_t tile = 0; tile < TILES; tile++) {
                    const uint4 v = x(tile, 32 * block + 8 * t);
                    mma(sums[tile], w[0], {v.x, v.y});
                    mma(sums[tile], w[1], {v.z, v.w});
                }
            }
        }
    }
    DEVICE void multiply_codes(float (&sums)[4], const uint4 &v, uint32_t block) const {
        constexpr uint32_t ONES = 0x3F803F80u;
        float c[4] = {}, ones[4] = {};
        uint32_t w[4];
        pairs(w, 2 * block);
        mma(c, w, {v.x, v.y});
        pairs(w, 2 * block + 1);
        mma(c, w, {v.z, v.w});
        if constexpr (AFFINE) {
            mma(ones, {ONES, ONES, ONES, ONES}, {v.x, v.y});
            mma(ones, {ONES, ONES, ONES, ONES}, {v.z, v.w});
        }
#pragma unroll
        for (uint32_t e = 0; e < 4; e++) {
            const float2 own = scale(block, e >= 2);
            sums[e] += own.x * c[e];
            if constexpr (AFFINE) sums[e] += (own.y - BIAS * own.x) * ones[e];
        }
    }
};

// Calls `run` with the format as a constant.
template <class Run>
DEVICE void with_format(uint32_t format, Run run) {
    if (format == WEIGHT_AFFINE4) run(QuantizedUnit<WEIGHT_AFFINE4>());
    else if (format == WEIGHT_AFFINE6) run(QuantizedUnit<WEIGHT_AFFINE6>());
    else if (format == WEIGHT_FINE6) run(QuantizedUnit<WEIGHT_FINE6>());
    else run(QuantizedUnit<WEIGHT_SYMMETRIC8>());
}

// One weight.
DEVICE float quantized_weight(const QuantizedPart &part, uint32_t cols, uint32_t row, uint32_t column) {
    const unsigned char *unit = tile_units(part, row, units_of(cols)) + column / 64 * unit_bytes(part.format);
    const uint32_t own = (row - part.first_row) % 16, block = column % 64 / 32, lane = own % 8 * 4 + column % 32 / 8;
    // Which operand, which pair of it, and which of the two.
    const uint32_t group = 2 * block + column % 8 / 4, pair = column % 4 / 2 * 2 + own / 8, upper = column % 2;
    auto word = [&](uint32_t at) { return load<uint32_t>(unit + at); };
    const uint32_t scales = word(own % 8 * 16 + own / 8 * 8 + block * 4);
    const uint32_t low = word(UNIT_SCALES + lane * 16 + group * 4) >> (4 * pair + 16 * upper) & 15;
    const uint32_t high_at = UNIT_SCALES + UNIT_LOW;
    const float minimum = half_to_float(scales >> 16);
    if (part.format == WEIGHT_AFFINE4) return half_to_float(scales) * low + minimum;
    if (part.format == WEIGHT_SYMMETRIC8) {
        const uint32_t high = word(high_at + lane * 16 + group * 4) >> (4 * pair + 16 * upper) & 15;
        return half_to_float(scales) * (static_cast<float>(16 * high + low) - 128.0f);
    }
    const uint32_t high = word(high_at + lane * 8 + block * 4) >> (2 * (group % 2 * 4 + pair) + 16 * upper) & 3;
    const float code = static_cast<float>(16 * high + low);
    if (part.format == WEIGHT_AFFINE6) return half_to_float(scales) * code + minimum;
    return half_to_float(column % 32 >= 16 ? scales >> 16 : scales) * (code - 32.0f);
}
