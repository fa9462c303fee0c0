// The same sum in single precision, where a CPU multiplies tiles of bfloat16 (AMX).
//
// A number of 24 bits is the sum of three with 8 bits each, x = h + m + l. Of their nine products
// with another's, six are taken: hh', hm', mh', hl', lh' and mm'; the rest is smaller than what the
// product is rounded by. All six take less than half of the time that vectors take for one, and as
// sums begin anew every few rows, less is rounded than by single precision alone.
//
// Every thread has rows of its own and a triangle of sums, of squares of two panels; the triangles
// are added up at the end. Those of the first two threads, if they are large, are where the sum will
// be: one below its diagonal, one above.

#if defined(HAS_THIRDS)

#include <sys/syscall.h>
#include <unistd.h>

namespace thirds {
namespace {

constexpr int SQUARE = WIDTH * WIDTH;          // sums: of two panels, in four tiles
constexpr int PIECES = 2;                      // of two panels, that fit the first cache
constexpr int64_t DEPTH = PIECES * DEEP;       // rows of x in these
constexpr int64_t PANEL = PIECES * PIECE;      // bytes
constexpr int64_t FEW = 640;                   // columns: squares in their order take less time

// What a tile has, for all eight of them.
struct alignas(LINE) Shape {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {LINE, LINE, LINE, LINE, LINE, LINE, LINE, LINE};
  uint8_t rows[16] = {SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE, SIDE};
};

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

// A square of sums, anywhere.
struct Square {
  float* start;
  int64_t step;

  float* tile(int down, int right) const { return start + (down * step + right) * SIDE; }
};

// The square of two panels, of which one is transposed.
void product(const char* left, const char* right, int pieces, Square to) {
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
  const int64_t step = to.step * sizeof(float);
  _tile_stored(0, to.tile(0, 0), step);
  _tile_stored(1, to.tile(0, 1), step);
  _tile_stored(2, to.tile(1, 0), step);
  _tile_stored(3, to.tile(1, 1), step);
}

// Add one square to another.
void add(Square from, Square to) {
  for (int i = 0; i < WIDTH; ++i)
    for (int j = 0; j < WIDTH; j += SIDE) {
      float* sum = to.start + i * to.step + j;
      const __m512 more = _mm512_loadu_ps(from.start + i * from.step + j);
      _mm512_storeu_ps(sum, _mm512_loadu_ps(sum) + more);
    }
}

// What a thread works with: a panel transposed, all as they are, vectors of their largest numbers,
// and the squares that are not where the sum will be: all, or those on its diagonal and at its edge.
class Room {
 public:
  Room(char* work, const Total<float>& total, int thread)
      : total(total), panels(panels_in(total.d)), thread(thread) {
    for (int t = 0; t < thread; ++t) work += bytes(total.d, t, total.adds);
    transposed = work;
    first_panel = transposed + PANEL;
    largest = reinterpret_cast<__m512i*>(first_panel + panels * PANEL);
    squares = reinterpret_cast<float*>(largest + panels * WIDTH);
  }

  static int64_t panels_in(int64_t d) { return (d + WIDTH - 1) / WIDTH; }

  static int64_t bytes(int64_t d, int thread, bool adds) {
    const int64_t n = panels_in(d), apart = is_apart(d, thread, adds) ? n * (n + 1) / 2 : 2 * n;
    return (n + 1) * PANEL + n * WIDTH * LINE + apart * SQUARE * sizeof(float);
  }

  char* panel(int64_t p) const { return first_panel + p * PANEL; }

  Square square(int64_t p, int64_t q) const {
    if (is_apart(total.d, thread, total.adds)) return own(p * (p + 1) / 2 + q);
    if (p == q) return own(p);
    if ((p + 1) * WIDTH > total.d) return own(panels + q);
    const int64_t down = thread ? q : p, right = thread ? p : q;
    return {total.start + (down * total.step + right) * WIDTH, total.step};
  }

  char* transposed;
  __m512i* largest;

 private:
  static bool is_apart(int64_t d, int thread, bool adds) { return adds || thread > 1 || d <= FEW; }

  Square own(int64_t n) const { return {squares + n * SQUARE, WIDTH}; }

  Total<float> total;
  int64_t panels;
  int thread;
  char* first_panel;
  float* squares;
};

// Sum some rows into the squares of panels p and q <= p, or of q and p along rows.
void sum(const Rows<float>& x, int64_t begin, bool along_rows, const Room& room) {
  alignas(LINE) float now[SQUARE];
  std::fill_n(room.largest, Room::panels_in(x.d) * WIDTH, _mm512_setzero_si512());
  for (int64_t row = begin; row < x.number; row += DEPTH) {
    const int pieces = (std::min<int64_t>(DEPTH, x.number - row) + DEEP - 1) / DEEP;
    for (int64_t p = 0; p * WIDTH < x.d; ++p) {
      char* panel = room.panel(p);
      for (int k = 0; k < pieces; ++k)
        copy(x, row + k * DEEP, p * WIDTH, along_rows, room.largest + p * WIDTH, panel + k * PIECE);
      for (int k = 0; k < pieces * PIECE; k += TILE) transpose(panel + k, room.transposed + k);
      for (int64_t q = 0; q <= p; ++q) {
        const char *left = along_rows ? room.panel(q) : room.transposed;
        const char *right = along_rows ? room.transposed : room.panel(q);
        const Square square = room.square(p, q), here{now, WIDTH};
        product(left, right, pieces, row == begin ? square : here);
        if (row > begin) add(here, square);
      }
    }
  }
}

// Whether the largest number of every column is of a size that has thirds, or zero.
bool have_thirds(const std::vector<Room>& rooms, int64_t panels, bool along_rows) {
  const auto fits = [](uint32_t bits) { return bits == 0 || (LEAST <= bits && bits < MOST); };
  for (int64_t n = 0; n < panels * WIDTH; ++n) {
    __m512i largest = _mm512_setzero_si512();
    for (const Room& room : rooms) largest = _mm512_max_epu32(largest, room.largest[n]);
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

// The squares of panels p and q from all threads, summed and scaled, where they belong: all of them
// are read before any of it is written.
void finish(const Total<float>& total, const std::vector<Room>& rooms, int64_t p, int64_t q,
            bool along_rows) {
  alignas(LINE) float tiles[4][SIDE * SIDE];
  for (int n = 0; n < 4; ++n)
    for (int i = 0; i < SIDE; ++i) {
      __m512 all = _mm512_setzero_ps();
      for (const Room& room : rooms) {
        const Square square = room.square(p, q);
        all += _mm512_loadu_ps(square.tile(n / 2, n % 2) + i * square.step);
      }
      _mm512_store_ps(tiles[n] + i * SIDE, all * total.scale);
    }
  if (along_rows) std::swap(p, q);
  for (int n = 0; n < 4; ++n) {
    if (p == q && n == 1) continue;  // above the diagonal
    const int64_t row = p * WIDTH + n / 2 * SIDE, column = q * WIDTH + n % 2 * SIDE;
    const auto here = total.corner(row, column, SIDE), there = total.corner(column, row, SIDE);
    const __mmask16 columns = (1u << here.columns) - 1;
    for (int i = 0; total.adds && i < here.rows; ++i) {
      const __m512 old = _mm512_maskz_loadu_ps(columns, here.start + i * here.step);
      _mm512_store_ps(tiles[n] + i * SIDE, _mm512_load_ps(tiles[n] + i * SIDE) + old);
    }
    place(tiles[n], row == column, here, there);
  }
}

// The sum; false if numbers are not of a size that has thirds, and then there is none.
bool gram(const Total<float>& total, const Rows<float>& x, char* work, int threads) {
  const int64_t panels = Room::panels_in(x.d), some = (x.number + DEPTH - 1) / DEPTH;
  threads = std::min<int64_t>(threads, some);
  const bool along_rows = runs(x.rows, x.number) > runs(x.columns, x.d);
  std::vector<Room> rooms;
  for (int t = 0; t < threads; ++t) rooms.emplace_back(work, total, t);
  bool fits = false;
#pragma omp parallel num_threads(threads)
  {
    const Shape shape;
    _tile_loadconfig(&shape);
#pragma omp for schedule(static)
    for (int t = 0; t < threads; ++t) {
      Rows<float> own = x;
      own.number = std::min(x.number, some * (t + 1) / threads * DEPTH);
      sum(own, some * t / threads * DEPTH, along_rows, rooms[t]);
    }
    _tile_release();
#pragma omp single
    fits = have_thirds(rooms, panels, along_rows);
#pragma omp for schedule(static, 1)
    for (int64_t p = 0; p < (fits ? panels : 0); ++p)
      for (int64_t q = 0; q <= p; ++q) finish(total, rooms, p, q, along_rows);
  }
  return fits;
}

}  // namespace
}  // namespace thirds

// Bytes of room for all threads; none where the system does not let a process have such tiles.
extern "C" int64_t gram_thirds_room(int64_t d, int threads, bool adds) {
  constexpr int ASK = 0x1023, TILES = 18;
  static const bool granted = syscall(SYS_arch_prctl, ASK, TILES) == 0;
  int64_t bytes = 0;
  for (int t = 0; granted && t < threads; ++t) bytes += thirds::Room::bytes(d, t, adds);
  return bytes;
}

extern "C" bool gram_thirds(float* total, int64_t step, double scale, bool adds, const float* x,
                            const int64_t* rows, int64_t number, const int64_t* columns, int64_t d,
                            char* work, int threads) {
  return thirds::gram({total, step, d, float(scale), adds}, {x, rows, columns, number, d}, work,
                      threads);
}

#else

extern "C" int64_t gram_thirds_room(int64_t, int, bool) { return 0; }

#endif
