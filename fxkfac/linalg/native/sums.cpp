// The sum of rows from products of their digits, where a CPU has tiles of bytes (AMX).
//
// Of wide x every thread takes some squares of the sum, from blocks that all have split. Of tall x
// it takes rows, with sums of its own that are added up at the end. Sizes were found by timing.

#if defined(HAS_DIGITS)

#include <sys/syscall.h>
#include <unistd.h>

namespace digits {
namespace {

constexpr int64_t MOST_BLOCKS = 4;   // of a panel at once
constexpr int64_t LEFTS = 4;         // panels whose blocks stay in the second cache, turned
constexpr int64_t NARROW = 640;      // columns whose sums stay there: x may be tall,
constexpr int64_t ROOM = 1 << 26;    // if all threads have no more bytes together

// Put a tile where there is room for all of it.
void put(const float* tile, int64_t step, bool passes, Corner<float> to) {
  for (int i = 0; i < SIDE; ++i) {
    const __m512 line = _mm512_load_ps(tile + i * step);
    float* there = to.start + i * to.step;
    passes ? _mm512_stream_ps(there, line) : _mm512_storeu_ps(there, line);
  }
}

// Put a tile in both of its places, or only what is below the diagonal that it lies on.
void place(const float* tile, bool diagonal, bool passes, Corner<float> here, Corner<float> there) {
  if (here.rows == SIDE && here.columns == SIDE && !diagonal) {
    alignas(LINE) float turned[SIDE * SIDE];
    transpose(tile, WIDTH * sizeof(float), turned, LINE);
    put(tile, WIDTH, passes, here);
    put(turned, SIDE, passes, there);
    return;
  }
  for (int i = 0; i < here.rows; ++i)
    for (int j = 0; j < (diagonal ? i + 1 : here.columns); ++j)
      here.start[i * here.step + j] = there.start[j * there.step + i] = tile[i * WIDTH + j];
}

// Scale the square of panels p and q, add what was there, if so, and put it where it belongs.
void finish(const Total<float>& total, int64_t p, int64_t q, bool adds, Square& square) {
  const bool passes = total.passes_cache(adds);
  for (int n = 0; n < 4; ++n) {
    const int64_t down = n / 2 * SIDE, across = n % 2 * SIDE;
    if (p == q && down < across) continue;  // above the diagonal
    const int64_t row = p * WIDTH + down, column = q * WIDTH + across;
    const auto here = total.corner(row, column, SIDE), there = total.corner(column, row, SIDE);
    const __mmask16 columns = (1u << here.columns) - 1;
    float* tile = square.sums + down * WIDTH + across;
    for (int i = 0; i < SIDE; ++i) {
      __m512 sum = _mm512_load_ps(tile + i * WIDTH) * total.scale;
      if (adds && i < here.rows)
        sum += _mm512_maskz_loadu_ps(columns, here.start + i * here.step);
      _mm512_store_ps(tile + i * WIDTH, sum);
    }
    place(tile, row == column, passes, here, there);
  }
}

int64_t panels_in(int64_t d) { return (d + WIDTH - 1) / WIDTH; }

int64_t squares_in(int64_t d) { return panels_in(d) * (panels_in(d) + 1) / 2; }

int64_t blocks_in(int64_t rows) { return (rows + DEPTH - 1) / DEPTH; }

int64_t most_blocks(int64_t rows) { return std::min(blocks_in(rows), MOST_BLOCKS); }

int pieces_in(int64_t rows) { return (std::min(rows, DEPTH) + DEEP - 1) / DEEP; }

// Room, a part at a time.
struct Room {
  char* next;

  template <class T>
  T* take(int64_t number) {
    return reinterpret_cast<T*>(std::exchange(next, next + number * sizeof(T)));
  }
};

// Some rows of x, split to panels of so many blocks.
struct Panels {
  const Block* blocks;
  int64_t each, rows;

  const Block& block(int64_t panel, int64_t b) const { return blocks[panel * each + b]; }
  int pieces(int64_t b) const { return pieces_in(rows - b * DEPTH); }
};

// One thread's squares of the sum: some panels on the left meet all on the right, one by one.
void squares(const Total<float>& total, const Panels& x, bool adds, Room room, int64_t thread,
             int64_t threads) {
  const int64_t panels = panels_in(total.d), all = squares_in(total.d);
  Block* turned = room.take<Block>(LEFTS * x.each);
  Square* sums = room.take<Square>(LEFTS);
  Products products;
  int64_t seen = 0;  // squares
  for (int64_t start = 0; start < panels; start += LEFTS) {
    const int64_t end = std::min(start + LEFTS, panels);
    bool are_turned = false;
    for (int64_t q = 0; q < end; ++q) {
      const int64_t first = std::max(start, q);
      const bool is_own = seen * threads / all == thread;
      seen += end - first;
      if (!is_own) continue;
      for (int64_t n = 0; !are_turned && n < (end - start) * x.each; ++n)
        turn(x.blocks[start * x.each + n], x.pieces(n % x.each), turned[n]);
      are_turned = true;
      for (int64_t b = 0; b < x.each; ++b)
        for (int64_t p = first; p < end; ++p)
          products.add(turned[(p - start) * x.each + b], x.block(q, b), x.pieces(b),
                       sums[p - start], b > 0);
      products.finish();
      for (int64_t p = first; p < end; ++p) finish(total, p, q, adds, sums[p - start]);
    }
  }
  _mm_sfence();  // what passed the cache
}

int64_t bytes_for_squares(int64_t blocks) {
  return LEFTS * (blocks * sizeof(Block) + sizeof(Square));
}

// Add the sums of a panel's columns to others, or put them there.
void add_sums(const float* from, float* to, int64_t number, bool adds) {
  for (int64_t j = 0; j < std::min<int64_t>(number, WIDTH); ++j)
    to[j] = adds ? to[j] + from[j] : from[j];
}

// How many rows were summed: those that come before the first that has no digits.
int64_t wide(const Total<float>& total, float* sums, const Rows<float>& x, Ways ways, Room room,
             int threads) {
  const int64_t most = most_blocks(x.number), panels = panels_in(x.d);
  Block* blocks = room.take<Block>(panels * most);
  int64_t done = 0;
  bool fits = true;
#pragma omp parallel num_threads(threads)
  {
    _tile_loadconfig(&SHAPE);
    populate(total, threads);
    for (int64_t row = 0; row < x.number; row += most * DEPTH) {
      const int64_t rows = std::min(most * DEPTH, x.number - row), each = blocks_in(rows);
#pragma omp for schedule(static) reduction(&& : fits)
      for (int64_t n = 0; n < panels * each; ++n)
        fits = split(x, row + n % each * DEPTH, n / each * WIDTH, ways, blocks[n]) && fits;
      if (!fits) break;
#pragma omp single nowait
      {
        done = row + rows;
        for (int64_t n = 0; n < (sums ? panels * each : 0); ++n) {
          const int64_t column = n / each * WIDTH;
          add_sums(blocks[n].sums, sums + column, x.d - column, row > 0 || n % each > 0);
        }
      }
#pragma omp for schedule(static)
      for (int t = 0; t < threads; ++t)
        squares(total, {blocks, each, rows}, total.adds || row > 0,
                {room.next + t * bytes_for_squares(most)}, t, threads);
    }
    _tile_release();
  }
  return done;
}

// One thread's sums: of products, and of columns.
struct Own {
  Square* squares;
  float* sums;
};

// One thread's rows of x: from one block to another.
bool sum(const Rows<float>& x, Ways ways, int64_t begin, int64_t end, Room room, Own own) {
  const int64_t panels = panels_in(x.d);
  Block *blocks = room.take<Block>(panels), *turned = room.take<Block>(1);
  Products products;
  bool fits = true;
  for (int64_t b = begin; fits && b < end; ++b) {
    const int pieces = pieces_in(x.number - b * DEPTH);
    for (int64_t p = 0; p < panels; ++p) {
      fits = split(x, b * DEPTH, p * WIDTH, ways, blocks[p]) && fits;
      if (ways.sums) add_sums(blocks[p].sums, own.sums + p * WIDTH, WIDTH, b > begin);
    }
    Square* square = own.squares;
    for (int64_t p = 0; p < panels; ++p) {
      products.finish();
      turn(blocks[p], pieces, *turned);
      for (int64_t q = 0; q <= p; ++q)
        products.add(*turned, blocks[q], pieces, *square++, b > begin);
    }
    products.finish();
  }
  return fits;
}

int64_t bytes_for_rows(int64_t d) {
  return (panels_in(d) + 1) * sizeof(Block) + squares_in(d) * sizeof(Square) +
         panels_in(d) * WIDTH * sizeof(float);
}

// The same, of tall x: all or none.
int64_t tall(const Total<float>& total, float* sums, const Rows<float>& x, Ways ways, Room room,
             int threads) {
  const int64_t panels = panels_in(x.d), all = blocks_in(x.number);
  std::vector<Own> own;
  for (int t = 0; t < threads; ++t)
    own.push_back({room.take<Square>(squares_in(x.d)), room.take<float>(panels * WIDTH)});
  bool fits = true;
#pragma omp parallel num_threads(threads)
  {
    _tile_loadconfig(&SHAPE);
#pragma omp for schedule(static) reduction(&& : fits)
    for (int t = 0; t < threads; ++t) {
      Room blocks{room.next + t * (panels + 1) * int64_t(sizeof(Block))};
      fits = sum(x, ways, all * t / threads, all * (t + 1) / threads, blocks, own[t]) && fits;
    }
    _tile_release();
#pragma omp for schedule(static, 1)
    for (int64_t p = 0; p < (fits ? panels : 0); ++p) {
      for (int64_t q = 0, n = p * (p + 1) / 2; q <= p; ++q, ++n) {
        for (int t = 1; t < threads; ++t) own[0].squares[n].add(own[t].squares[n]);
        finish(total, p, q, total.adds, own[0].squares[n]);
      }
      for (int t = 0; t < (ways.sums ? threads : 0); ++t)
        add_sums(own[t].sums + p * WIDTH, sums + p * WIDTH, x.d - p * WIDTH, t > 0);
    }
    _mm_sfence();
  }
  return fits ? x.number : 0;
}

// Which of both.
bool is_tall(int64_t rows, int64_t d, int threads) {
  return threads > 1 && d <= NARROW && blocks_in(rows) >= threads &&
         threads * bytes_for_rows(d) <= ROOM;
}

}  // namespace
}  // namespace digits

// Bytes of room for all threads; none where the system does not let a process have such tiles.
extern "C" int64_t digits_room(int64_t rows, int64_t d, int threads) {
  using namespace digits;
  constexpr int ASK = 0x1023, TILES = 18;
  static const bool granted = syscall(SYS_arch_prctl, ASK, TILES) == 0;
  if (!granted) return 0;
  if (is_tall(rows, d, threads)) return threads * bytes_for_rows(d);
  const int64_t blocks = most_blocks(rows);
  return panels_in(d) * blocks * sizeof(Block) + threads * bytes_for_squares(blocks);
}

// How many of the first rows were summed; if asked for, there are also the sums of their columns.
extern "C" int64_t digits_gram(float* total, int64_t step, double scale, bool adds, const float* x,
                               const int64_t* rows, int64_t number, const int64_t* columns,
                               int64_t d, float* sums, char* room, int threads) {
  using namespace digits;
  const auto take = is_tall(number, d, threads) ? tall : wide;
  const Ways ways{runs(rows, number) > runs(columns, d), sums != nullptr};
  return take({total, step, d, float(scale), adds}, sums, {x, rows, columns, number, d}, ways,
              {room}, threads);
}

#else

extern "C" int64_t digits_room(int64_t, int64_t, int) { return 0; }

#endif
