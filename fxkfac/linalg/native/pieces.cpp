// Numbers in single precision as three in bfloat16 each, in panels that tiles (AMX) read.
//
// x = h + m + l, of 8 bits each, from the largest to the smallest.

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__)
#define HAS_THIRDS

#include <immintrin.h>

namespace thirds {
namespace {

constexpr int PARTS = 3;
constexpr int SIDE = 16;                 // numbers in a vector, and lines of a tile
constexpr int WIDTH = 2 * SIDE;          // columns of x: the width of a panel
constexpr int DEEP = 2 * SIDE;           // rows of x in a piece of one
constexpr int TILE = SIDE * LINE;        // bytes
constexpr int PIECE = PARTS * 2 * TILE;  // bytes
// Bits of sizes that a column's largest number may have. The thirds of smaller products vanish, and
// sums of larger ones may leave the range before they come back. What is no number is larger, too.
constexpr uint32_t LEAST = (127 - 50) << 23, MOST = (127 + 50) << 23;

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

// 16 x 16 of 32 bits, from lines one after the other to lines that are so many bytes apart.
void transpose(const char* from, char* to, int64_t step = LINE) {
  __m512i a[SIDE], b[SIDE];
  for (int i = 0; i < SIDE; ++i) a[i] = _mm512_load_si512(from + i * LINE);
  for (int i = 0; i < SIDE; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < SIDE; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < SIDE; j += 8) {
      b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0x88);
      b[i + j + 4] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0xdd);
    }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(to + i * step, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 8) * step, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
  }
}

// The parts of two vectors, in pairs of one's number and the other's.
void split(__m512 a, __m512 b, char* to) {
  const __m512i pairs = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  for (int part = 0; part < PARTS; ++part, to += 2 * TILE) {
    const __m512i both = _mm512_permutexvar_epi16(pairs, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    _mm512_store_si512(to, both);
    a -= (__m512)_mm512_slli_epi32(both, 16);
    b -= (__m512)_mm512_and_si512(both, _mm512_set1_epi32(0xffff0000));
  }
}

// A piece of a panel. Vectors are read along the axis whose entries follow one another: the first of
// two in a line is of the same column and earlier rows, or of the row before. The largest numbers
// are kept for each column, or for each place in the vectors of 16 columns.
void copy(const Rows<float>& x, int64_t row, int64_t column, bool along_rows, __m512i* largest,
          char* to) {
  const int64_t *rows = x.rows + row, *columns = x.columns + column;
  const int64_t down = x.number - row, across = x.d - column;
  const int64_t *along = along_rows ? rows : columns, *other = along_rows ? columns : rows;
  const int64_t length = along_rows ? down : across, lines = along_rows ? across : down;
  const Line first(along, length), second(along + SIDE, length - SIDE);
  const auto read = [&](const Line& line, int64_t n) {
    return n < lines ? line.read(x.x + other[n]) : _mm512_setzero_ps();
  };
  for (int n = 0; n < WIDTH; ++n, to += LINE) {
    const Line& line = n < SIDE ? first : second;
    const __m512 a = along_rows ? read(first, n) : read(line, 2 * n % DEEP);
    const __m512 b = along_rows ? read(second, n) : read(line, 2 * n % DEEP + 1);
    __m512i& most = largest[along_rows ? n : n / SIDE];
    most = _mm512_max_epu32(most, (__m512i)_mm512_abs_ps(a));
    most = _mm512_max_epu32(most, (__m512i)_mm512_abs_ps(b));
    split(a, b, to);
  }
}

}  // namespace
}  // namespace thirds

#endif
