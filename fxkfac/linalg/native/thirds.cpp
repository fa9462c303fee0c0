// The same sum in single precision, where a CPU multiplies tiles of bfloat16 (AMX).
//
// A number of 24 bits is the sum of three with 8 bits each, x = h + m + l. Of their nine products
// with another's, six are taken: hh', hm', mh', hl', lh' and mm'; the rest is smaller than what the
// product is rounded by. All six take less than half of the time that vectors take for one, and as
// sums begin anew every few rows, less is rounded than by single precision alone.
//
// Every thread has rows of its own and a triangle of sums, of squares of two panels; the triangles
// are added up at the end.

#if defined(__linux__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__)

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace thirds {
namespace {

constexpr int PARTS = 3;
constexpr int SIDE = 16;                    // sums: of a tile, whose rows are vectors
constexpr int WIDTH = 2 * SIDE;             // columns of x: the width of a panel
constexpr int SQUARE = WIDTH * WIDTH;       // sums: of two panels, in four tiles
constexpr int DEEP = 2 * SIDE;              // rows of x that one instruction takes
constexpr int TILE = SIDE * LINE;           // bytes
constexpr int PIECE = PARTS * 2 * TILE;     // bytes: so many rows of a panel
constexpr int PIECES = 4;                   // so many of a panel fit the first cache
constexpr int PANEL = PIECES * PIECE;       // bytes
// Bits of sizes that a column's largest number may have. The thirds of smaller products vanish, and
// sums of larger ones may leave the range before they come back. What is no number is larger, too.
constexpr uint32_t LEAST = (127 - 50) << 23, MOST = (127 + 50) << 23;

// What a tile has, for all eight of them.
struct alignas(LINE) Shape {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {LINE, LINE, LINE, LINE, LINE, LINE, LINE, LINE};
  uint8_t rows[16] = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE};
};

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

#define LEFT(part)                              \
  _tile_loadd(4, left + 2 * part * TILE, LINE); \
  _tile_loadd(5, left + (2 * part + 1) * TILE, LINE);
#define RIGHT(part)                              \
  _tile_loadd(6, right + 2 * part * TILE, LINE); \
  _tile_loadd(7, right + (2 * part + 1) * TILE, LINE);
#define MULTIPLY           \
  _tile_dpbf16ps(0, 4, 6); \
  _tile_dpbf16ps(1, 4, 7); \
  _tile_dpbf16ps(2, 5, 6); \
  _tile_dpbf16ps(3, 5, 7);

// The square of two panels, of which one is transposed.
void product(const char* left, const char* right, int pieces, float* square) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int k = 0; k < pieces; ++k, left += PIECE, right += PIECE) {
    LEFT(0) RIGHT(2) MULTIPLY
    RIGHT(1) MULTIPLY
    LEFT(1) MULTIPLY
    RIGHT(0) MULTIPLY
    LEFT(2) MULTIPLY
    LEFT(0) MULTIPLY
  }
  _tile_stored(0, square, LINE);
  _tile_stored(1, square + SQUARE / 4, LINE);
  _tile_stored(2, square + SQUARE / 2, LINE);
  _tile_stored(3, square + SQUARE / 4 * 3, LINE);
}

// What a thread works with: a panel transposed, all as they are, vectors of their largest numbers,
// and squares of sums.
struct Room {
  char *transposed, *panels;
  __m512i* largest;
  float* squares;

  Room(char* start, int64_t number)
      : transposed(start),
        panels(start + PANEL),
        largest(reinterpret_cast<__m512i*>(panels + number * PANEL)),
        squares(reinterpret_cast<float*>(largest + number * WIDTH)) {}

  static int64_t bytes(int64_t number) {
    const int64_t sums = number * (number + 1) / 2 * SQUARE * sizeof(float);
    return (number + 1) * PANEL + number * WIDTH * LINE + sums;
  }
};

// Sum some rows into the squares of panels p and q <= p, or of q and p along rows.
void sum(const Rows<float>& x, int64_t begin, bool along_rows, Room room) {
  alignas(LINE) float now[SQUARE];
  for (int64_t p = 0; p * WIDTH < x.d; ++p)
    std::fill_n(room.largest + p * WIDTH, WIDTH, _mm512_setzero_si512());
  for (int64_t row = begin; row < x.number; row += DEPTH) {
    const int pieces = (std::min<int64_t>(DEPTH, x.number - row) + DEEP - 1) / DEEP;
    float* square = room.squares;
    for (int64_t p = 0; p * WIDTH < x.d; ++p) {
      char* panel = room.panels + p * PANEL;
      for (int k = 0; k < pieces; ++k)
        copy(x, row + k * DEEP, p * WIDTH, along_rows, room.largest + p * WIDTH, panel + k * PIECE);
      for (int k = 0; k < pieces * PIECE; k += TILE) transpose(panel + k, room.transposed + k);
      for (int64_t q = 0; q <= p; ++q, square += SQUARE) {
        const char* other = room.panels + q * PANEL;
        const char* left = along_rows ? other : room.transposed;
        const char* right = along_rows ? room.transposed : other;
        product(left, right, pieces, row == begin ? square : now);
        if (row > begin)
          for (int i = 0; i < SQUARE; i += SIDE)
            _mm512_store_ps(square + i, _mm512_load_ps(square + i) + _mm512_load_ps(now + i));
      }
    }
  }
}

// Whether the largest number of every column is of a size that has thirds, or zero.
bool have_thirds(char* work, int64_t panels, bool along_rows, int threads) {
  const auto fits = [](uint32_t bits) { return bits == 0 || (LEAST <= bits && bits < MOST); };
  for (int64_t n = 0; n < panels * WIDTH; ++n) {
    __m512i largest = _mm512_setzero_si512();
    for (int t = 0; t < threads; ++t)
      largest = _mm512_max_epu32(largest, Room(work + t * Room::bytes(panels), panels).largest[n]);
    if (along_rows) {
      if (!fits(_mm512_reduce_max_epu32(largest))) return false;
    } else {
      alignas(LINE) uint32_t each[SIDE];
      _mm512_store_si512(each, largest);
      if (!std::all_of(each, each + SIDE, fits)) return false;
    }
  }
  return true;
}

// Put a tile in both of its places, or only what is below the diagonal that it lies on.
void place(const float* tile, bool diagonal, Corner<float> here, Corner<float> there) {
  if (here.rows == SIDE && here.columns == SIDE && !diagonal) {
    for (int i = 0; i < SIDE; ++i)
      _mm512_storeu_ps(here.start + i * here.step, _mm512_load_ps(tile + i * SIDE));
    transpose((const char*)tile, (char*)there.start, there.step * sizeof(float));
    return;
  }
  for (int i = 0; i < here.rows; ++i)
    for (int j = 0; j < (diagonal ? i + 1 : here.columns); ++j)
      here.start[i * here.step + j] = there.start[j * there.step + i] = tile[i * SIDE + j];
}

// Add what is there, where the tile belongs.
void add(float* tile, Corner<float> here) {
  const __mmask16 columns = (1u << here.columns) - 1;
  for (int i = 0; i < here.rows; ++i, tile += SIDE) {
    const __m512 old = _mm512_maskz_loadu_ps(columns, here.start + i * here.step);
    _mm512_store_ps(tile, _mm512_load_ps(tile) + old);
  }
}

// The squares of panels p and q from all threads, summed and scaled, where they belong.
void finish(const Total<float>& total, int64_t p, int64_t q, const float* squares, int64_t apart,
            int threads) {
  alignas(LINE) float tile[SIDE * SIDE];
  for (int n = 0; n < 4; ++n, squares += SIDE * SIDE) {
    if (p == q && n == 1) continue;  // above the diagonal
    const int64_t row = p * WIDTH + n / 2 * SIDE, column = q * WIDTH + n % 2 * SIDE;
    const auto here = total.corner(row, column, SIDE), there = total.corner(column, row, SIDE);
    here.fetch(0, SIDE), there.fetch(0, SIDE);
    for (int i = 0; i < SIDE * SIDE; i += SIDE) {
      __m512 all = _mm512_load_ps(squares + i);
      for (int t = 1; t < threads; ++t) all += _mm512_load_ps(squares + t * apart + i);
      _mm512_store_ps(tile + i, all * total.scale);
    }
    if (total.adds) add(tile, here);
    place(tile, row == column, here, there);
  }
}

// The sum; false if numbers are not of a size that has thirds, and then nothing is written.
bool gram(const Total<float>& total, const Rows<float>& x, char* work, int threads) {
  const int64_t panels = (x.d + WIDTH - 1) / WIDTH, some = (x.number + DEPTH - 1) / DEPTH;
  const bool along_rows = runs(x.rows, x.number) > runs(x.columns, x.d);
  const int64_t bytes = Room::bytes(panels), apart = bytes / sizeof(float);
  bool fits = false;
#pragma omp parallel num_threads(threads)
  {
    const Shape shape;
    _tile_loadconfig(&shape);
#pragma omp for schedule(static)
    for (int t = 0; t < threads; ++t) {
      Rows<float> own = x;
      own.number = std::min(x.number, some * (t + 1) / threads * DEPTH);
      sum(own, some * t / threads * DEPTH, along_rows, Room(work + t * bytes, panels));
    }
    _tile_release();
#pragma omp single
    fits = have_thirds(work, panels, along_rows, threads);
#pragma omp for schedule(static, 1)
    for (int64_t p = 0; p < (fits ? panels : 0); ++p)
      for (int64_t q = 0; q <= p; ++q) {
        const float* squares = Room(work, panels).squares + (p * (p + 1) / 2 + q) * SQUARE;
        finish(total, along_rows ? q : p, along_rows ? p : q, squares, apart, threads);
      }
  }
  return fits;
}

}  // namespace
}  // namespace thirds

// Bytes of room for each thread; none where the system does not let a process have such tiles.
extern "C" int64_t gram_thirds_room(int64_t d) {
  constexpr int ASK = 0x1023, TILES = 18;
  static const bool granted = syscall(SYS_arch_prctl, ASK, TILES) == 0;
  return granted ? thirds::Room::bytes((d + thirds::WIDTH - 1) / thirds::WIDTH) : 0;
}

extern "C" bool gram_thirds(float* total, int64_t step, double scale, bool adds, const float* x,
                            const int64_t* rows, int64_t number, const int64_t* columns, int64_t d,
                            char* work, int threads) {
  return thirds::gram({total, step, d, float(scale), adds}, {x, rows, columns, number, d}, work,
                      threads);
}

#else

extern "C" int64_t gram_thirds_room(int64_t) { return 0; }

#endif
