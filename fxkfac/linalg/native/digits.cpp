// Numbers in single precision as three digits of 8 bits each, in blocks that tiles (AMX) read.
//
// x = scale * (2^16 a + 2^8 b + c), with digits from -128 to 127 and a scale that the numbers of a
// column share in a few rows: its largest one has 22 or 23 bits, others what is left of these.

#if defined(__linux__) && defined(__AMX_INT8__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define HAS_DIGITS

#include <immintrin.h>

namespace digits {
namespace {

constexpr int DIGITS = 3;
constexpr int SIDE = 16;                  // numbers in a vector, and lines of a tile
constexpr int WIDTH = 2 * SIDE;           // columns of x in a block
constexpr int DEEP = 4 * SIDE;            // rows of x in a piece of one
constexpr int PIECES = 4;                 // in a block: one and a half fit the first cache
constexpr int64_t DEPTH = PIECES * DEEP;  // rows of x in a block
constexpr int TILE = SIDE * LINE;         // bytes
constexpr int PIECE = DIGITS * 2 * TILE;
// Bits of sizes that a column's largest number may have. Scales of smaller ones would leave the
// range, as sums of larger ones might before they come back. What is no number is larger, too.
constexpr uint32_t LEAST = (127 - 100) << 23, MOST = (127 + 50) << 23;

// 32 columns. A piece has tiles of each digit, of 16 columns and of 16 more; a line of a tile has
// four rows of x, the four digits of a column together. Sums of columns are there if asked for.
struct alignas(LINE) Block {
  char pieces[PIECES * PIECE];
  float scales[WIDTH], sums[WIDTH];
};

// How many of the first entries follow the one before.
int64_t runs(const int64_t* offsets, int64_t number) {
  int64_t found = 0;
  for (int64_t k = 1; k < std::min<int64_t>(number, 64); ++k)
    found += offsets[k] == offsets[k - 1] + 1;
  return found;
}

// Up to 16 places of an axis; zeros are read behind the last one.
class Line {
 public:
  Line(const int64_t* places, int64_t number)
      : places(places), mask((1u << std::clamp<int64_t>(number, 0, SIDE)) - 1) {
    const auto run = [&](int n) { return number >= n && adjacent(places, n); };
    together = run(std::clamp<int64_t>(number, 0, SIDE));
    halves = run(SIDE / 2) && number >= SIDE && adjacent(places + SIDE / 2, SIDE / 2);
  }

  __m512 read(const float* x) const {
    if (!mask) return _mm512_setzero_ps();
    if (together) return _mm512_maskz_loadu_ps(mask, x + *places);
    const __m256 low = halves ? _mm256_loadu_ps(x + places[0]) : gather(x, 0);
    const __m256 high = halves ? _mm256_loadu_ps(x + places[SIDE / 2]) : gather(x, SIDE / 2);
    return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
  }

 private:
  __m256 gather(const float* x, int from) const {
    const __mmask8 here = mask >> from;
    const __m512i offsets = _mm512_maskz_loadu_epi64(here, places + from);
    return _mm512_mask_i64gather_ps(_mm256_setzero_ps(), here, offsets, x, sizeof(float));
  }

  const int64_t* places;
  __mmask16 mask;
  bool together, halves;
};

// 16 x 16 of 32 bits, between lines that are so many bytes apart.
void transpose(const void* from, int64_t from_step, void* to, int64_t to_step) {
  constexpr int SIZE = sizeof(float);
  vectors::transpose((const float*)from, from_step / SIZE, (float*)to, to_step / SIZE);
}

// The digits of four vectors: a line for each size, in which the four of a place are together.
void split(const float* x, int64_t step, __m512 inverse, char* to) {
  const auto digits = [&](int n) {
    const __m512i middle = _mm512_set1_epi32(0x808080);  // bytes become digits that have signs
    const __m512i number = _mm512_cvtps_epi32(_mm512_load_ps(x + n * step) * inverse);
    return _mm512_xor_si512(_mm512_add_epi32(number, middle), middle);
  };
  // Bits of one number or another.
  const auto choose = [](uint32_t bits, __m512i these, __m512i others) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(bits), these, others, 0xca);
  };
  const __m512i a = digits(0), b = digits(1), c = digits(2), d = digits(3);
  const __m512i ab = choose(0xff00ff00, _mm512_slli_epi32(b, 8), a),
                cd = choose(0xff00ff00, _mm512_slli_epi32(d, 8), c),
                middle_ab = choose(0xff00ff00, b, _mm512_srli_epi32(a, 8)),
                middle_cd = choose(0xff00ff00, d, _mm512_srli_epi32(c, 8));
  _mm512_store_si512(to, choose(0xffff0000, cd, _mm512_srli_epi32(ab, 16)));
  const __m512i middle = choose(0xffff0000, _mm512_slli_epi32(middle_cd, 16), middle_ab);
  _mm512_store_si512(to + 2 * TILE, middle);
  _mm512_store_si512(to + 4 * TILE, choose(0xffff0000, _mm512_slli_epi32(cd, 16), ab));
}

// Scales of 16 columns from the bits of their largest numbers, and inverses; whether all have one.
bool find_scales(__m512i largest, float* scales, float* inverses) {
  const auto bits = [](uint32_t n) { return _mm512_set1_epi32(n); };
  const __mmask16 zeros = _mm512_testn_epi32_mask(largest, largest);
  const __mmask16 fit = _mm512_cmpge_epu32_mask(largest, bits(LEAST)) &
                        _mm512_cmplt_epu32_mask(largest, bits(MOST));
  // The largest digits are 127, not 128: a number close to a power of two counts as that one.
  const __m512i close = _mm512_add_epi32(largest, bits(1 << 17));
  const __m512i power = _mm512_mask_srli_epi32(bits(127), (__mmask16)~zeros, close, 23);
  _mm512_store_si512(scales, _mm512_slli_epi32(_mm512_sub_epi32(power, bits(22)), 23));
  _mm512_store_si512(inverses, _mm512_slli_epi32(_mm512_sub_epi32(bits(2 * 127 + 22), power), 23));
  return (zeros | fit) == 0xffff;
}

// Some of x as it is: lines along that axis whose entries follow one another, of rows up to the end
// of a piece.
struct Numbers {
  alignas(LINE) float x[DEPTH * WIDTH];
  bool along_rows;
  int64_t rows, step;

  Numbers(const Rows<float>& from, int64_t row, int64_t column, bool along_rows)
      : along_rows(along_rows), step(along_rows ? DEPTH : WIDTH) {
    const int64_t *down = from.rows + row, *across = from.columns + column;
    const int64_t height = std::min(DEPTH, from.number - row), width = from.d - column;
    rows = (height + DEEP - 1) / DEEP * DEEP;
    if (along_rows)
      read(from.x, down, height, rows, across, width, WIDTH);
    else
      read(from.x, across, width, WIDTH, down, height, rows);
  }

  // The bits of the largest number of 16 columns.
  __m512i largest(int column) const {
    alignas(LINE) uint32_t found[SIDE];
    __m512i most = _mm512_setzero_si512();
    const auto see = [&](const float* some) {
      most = _mm512_max_epu32(most, (__m512i)_mm512_abs_ps(_mm512_load_ps(some)));
    };
    if (!along_rows) {
      for (int64_t n = 0; n < rows; ++n) see(x + n * step + column);
      return most;
    }
    for (int i = 0; i < SIDE; ++i, most = _mm512_setzero_si512()) {
      for (int64_t n = 0; n < rows; n += SIDE) see(x + (column + i) * step + n);
      found[i] = _mm512_reduce_max_epu32(most);
    }
    return _mm512_load_si512(found);
  }

  // The sum of each column; several at a time, as an addition waits for the one before.
  void sum(float* to) const {
    if (along_rows) {
      for (int j = 0; j < WIDTH; ++j) {
        __m512 sum = _mm512_setzero_ps();
        for (int64_t n = 0; n < rows; n += SIDE) sum += _mm512_load_ps(x + j * step + n);
        to[j] = _mm512_reduce_add_ps(sum);
      }
      return;
    }
    __m512 sums[4][WIDTH / SIDE] = {};
    for (int64_t n = 0; n < rows * WIDTH; n += SIDE)
      sums[n / WIDTH % 4][n / SIDE % 2] += _mm512_load_ps(x + n);
    for (int half = 0; half < 2; ++half)
      _mm512_store_ps(to + half * SIDE,
                      (sums[0][half] + sums[1][half]) + (sums[2][half] + sums[3][half]));
  }

 private:
  void read(const float* from, const int64_t* along, int64_t length, int64_t padded,
            const int64_t* lines, int64_t number, int64_t all) {
    for (int64_t v = 0; v < padded; v += SIDE) {
      const Line line(along + v, length - v);
      for (int64_t n = 0; n < all; ++n)
        _mm512_store_ps(x + n * step + v,
                        n < number ? line.read(from + lines[n]) : _mm512_setzero_ps());
    }
  }
};

// Which axis of x is read along, and whether its columns are summed.
struct Ways {
  bool along_rows, sums;
};

// The digits of some of x, up to the end of a piece; false where a column has no scale.
bool split(const Rows<float>& x, int64_t row, int64_t column, Ways ways, Block& to) {
  const bool along_rows = ways.along_rows;
  const Numbers numbers(x, row, column, along_rows);
  if (ways.sums) numbers.sum(to.sums);
  alignas(LINE) float inverses[WIDTH];
  bool fits = true;
  for (int half = 0; half < WIDTH; half += SIDE)
    fits &= find_scales(numbers.largest(half), to.scales + half, inverses + half);
  for (int64_t k = 0; k < numbers.rows; k += DEEP) {
    char* piece = to.pieces + k / DEEP * PIECE;
    if (along_rows) {
      alignas(LINE) char turned[PIECE];
      for (int n = 0; n < WIDTH; ++n)
        split(numbers.x + n * DEPTH + k, SIDE, _mm512_set1_ps(inverses[n]), turned + n * LINE);
      for (int n = 0; n < PIECE; n += TILE) transpose(turned + n, LINE, piece + n, LINE);
    } else {
      for (int n = 0; n < WIDTH; ++n) {
        const int line = n % SIDE, half = n - line;
        split(numbers.x + (k + 4 * line) * WIDTH + half, WIDTH, _mm512_load_ps(inverses + half),
              piece + n * LINE);
      }
    }
  }
  return fits;
}

}  // namespace
}  // namespace digits

#endif
