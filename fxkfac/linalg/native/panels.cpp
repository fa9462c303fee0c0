// total = scale * sum of x x^T over rows, or that added: both triangles, of which one is computed.
//
// Tiles are products of two panels, a few rows at a time in registers; from the first cache their
// numbers go to both of their places. Of wide x a thread that is free takes the next few tiles,
// from panels that all have copied. Of tall x each takes rows, with panels and tiles of its own,
// which are added up at the end. Sizes were found by timing.

namespace vectors {
namespace {

constexpr int64_t DEPTH = 128;      // rows of x: so many of two panels fit the first cache
constexpr int64_t BLOCK = 4;        // panels: so many and one more fit the second cache
constexpr int64_t OWN = 1 << 12;    // bytes for each row of x: panels and tiles of a thread, tall,
constexpr int64_t MOST = 1 << 22;   // which are no more than these,
constexpr int64_t ALL = 1 << 26;    // and those of all threads together than these
constexpr int64_t CHUNK = 1 << 18;  // numbers of wide x that are copied at once, or, if more,
constexpr int64_t SUMS = 2;         // times as many as the sum has

// Put a vector where it belongs, past the cache or not.
template <class T>
void pass(const Vector<T>& vector, [[maybe_unused]] bool passes, T* to) {
#if defined(__AVX512F__) && defined(__clang__)
  if (passes) return __builtin_nontemporal_store(vector, reinterpret_cast<Vector<T>*>(to));
#elif defined(__AVX512F__)  // as immintrin.h has it, which takes long to compile
  using Line [[gnu::vector_size(LINE)]] = long long;
  if (passes) return __builtin_ia32_movntdq512(reinterpret_cast<Line*>(to), (Line)vector);
#endif
  write(vector, to);
}

// Put a square where there is room for all of it, or for a part.
template <class T>
void put(const Square<T>& square, bool passes, Corner<T> to) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES<T>; ++i) {
    if (i >= to.rows) return;
    T* there = to.start + i * to.step;
    if (to.columns < LANES<T>)
      std::memcpy(there, &square[i], to.columns * sizeof(T));
    else
      pass<T>(square[i], passes, there);
  }
}

// Wait for what went past the caches.
void arrive() {
#if defined(__AVX512F__)
  __builtin_ia32_sfence();
#endif
}

// A square of a tile, scaled, with what was there, if that is added to.
template <class T>
void scaled(const T* tile, T scale, bool adds, Corner<T> there, Square<T>& square) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES<T>; ++i) {
    Vector<T> before{};
    if (adds && i < there.rows)
      std::memcpy(&before, there.start + i * there.step, there.columns * sizeof(T));
    square[i] = before + scale * read(tile + i * WIDTH<T>);
  }
}

// Put a tile of panels p and q in both of its places. Returns the sum of what is on the diagonal.
template <class T>
T store(const Total<T>& total, int64_t p, int64_t q, bool adds, const Tile<T>& tile) {
  const bool passes = BYTES == LINE && total.passes_cache(adds);
  T trace = 0;
  for (int i = 0; i < WIDTH<T>; i += LANES<T>)
    for (int j = 0; j < (p == q ? i + LANES<T> : WIDTH<T>); j += LANES<T>) {
      const int64_t row = p * WIDTH<T> + i, column = q * WIDTH<T> + j;
      const auto below = total.corner(row, column, LANES<T>);
      if (!below.rows || !below.columns) continue;
      Square<T> square;
      scaled<T>(tile.sums + i * WIDTH<T> + j, total.scale, adds, below, square);
      put<T>(square, passes, below);
      if (row == column) {
        for (int k = 0; k < below.rows; ++k) trace += square[k][k];
      } else {
        transpose<T>(square);
        put<T>(square, passes, total.corner(column, row, LANES<T>));
      }
    }
  return trace;
}

template <class T>
Part part_of(int64_t d, int64_t p, int64_t q) {
  const auto width = [&](int64_t n) { return (int)std::min<int64_t>(WIDTH<T>, d - n * WIDTH<T>); };
  return {width(p), width(q), p == q};
}

// Tiles of one panel and of a few others, not above the diagonal.
struct Strip {
  int64_t p, first, end;
};

// Those of the whole sum, block by block. The shortest come last, so that all threads end at once.
std::vector<Strip> strips_of(int64_t panels) {
  std::vector<Strip> found;
  for (int64_t down = 0; down < panels; down += BLOCK)
    for (int64_t across = 0; across <= down; across += BLOCK)
      for (int64_t p = down; p < std::min(down + BLOCK, panels); ++p)
        found.push_back({p, across, std::min(across + BLOCK, p + 1)});
  std::reverse(found.begin(), found.end());
  return found;
}

template <class T>
int64_t chunk_of(int64_t rows, int64_t d) {
  const int64_t padded = panels_in<T>(d) * WIDTH<T>;
  return std::min(rows, std::max(CHUNK, SUMS * padded * padded) / padded);
}

template <class T>
int64_t room_for_columns(int64_t rows, int64_t d) {
  return (chunk_of<T>(rows, d) + 1) * panels_in<T>(d) * WIDTH<T>;
}

// The tiles of a strip: their sums, from panels that have so many rows.
template <class T>
T take(const Total<T>& total, Strip strip, const T* panels, int64_t rows, bool adds) {
  const auto [p, first, end] = strip;
  alignas(LINE) Tile<T> tiles[BLOCK];
  for (int64_t k = 0; k < rows; k += DEPTH)
    for (int64_t q = first; q < end; ++q) {
      const T* left = panels + (p * rows + k) * WIDTH<T>;
      const T* right = panels + (q * rows + k) * WIDTH<T>;
      const Piece piece{0, std::min(DEPTH, rows - k)};
      const Part part = part_of<T>(total.d, p, q);
      product(left, right, {&piece, &piece + 1}, part, k > 0, tiles[q - first]);
    }
  T trace = 0;
  for (int64_t q = first; q < end; ++q) trace += store(total, p, q, adds, tiles[q - first]);
  return trace;
}

// Sums of columns, if asked for, come first in the room.
template <class T>
T wide(const Total<T>& total, const Rows<T>& x, bool summed, T* room, int threads) {
  const int64_t chunk = chunk_of<T>(x.number, x.d), count = panels_in<T>(x.d);
  const std::vector<Strip> strips = strips_of(count);
  T *panels = room + count * WIDTH<T>, trace = 0;
#pragma omp parallel num_threads(threads)
  {
    populate(total, threads);
    for (int64_t first = 0; first < x.number; first += chunk) {
      const int64_t number = std::min(chunk, x.number - first), size = number * WIDTH<T>;
#pragma omp for schedule(static)
      for (int64_t p = 0; p < count; ++p) {
        copy(x, first, number, p * WIDTH<T>, part_of<T>(x.d, p, p).columns, panels + p * size);
        if (summed) add_columns(panels + p * size, number, first > 0, room + p * WIDTH<T>);
      }
#pragma omp for schedule(dynamic) reduction(+ : trace)
      for (size_t n = 0; n < strips.size(); ++n)
        trace += take(total, strips[n], panels, number, total.adds || first > 0);
      arrive();
    }
  }
  return trace;
}

int64_t tiles_in(int64_t panels) { return panels * (panels + 1) / 2; }

template <class T>
int64_t room_for_rows(int64_t d) {
  const int64_t panels = panels_in<T>(d);
  return panels * (DEPTH + 1) * WIDTH<T> + tiles_in(panels) * WIDTH<T> * WIDTH<T>;
}

// What a thread has for itself.
template <class T>
struct Own {
  T *sums, *panels;
  Tile<T>* tiles;

  Own(T* room, int64_t d, int thread)
      : sums(room + thread * room_for_rows<T>(d)),
        panels(sums + panels_in<T>(d) * WIDTH<T>),
        tiles(reinterpret_cast<Tile<T>*>(panels + panels_in<T>(d) * DEPTH * WIDTH<T>)) {}

  // Some rows, no more than DEPTH.
  void take(const Rows<T>& x, int64_t first, int64_t number, bool adds, bool summed) {
    const int64_t size = DEPTH * WIDTH<T>;
    const Piece piece{0, number};
    Tile<T>* tile = tiles;
    for (int64_t p = 0; p < panels_in<T>(x.d); ++p) {
      copy(x, first, number, p * WIDTH<T>, part_of<T>(x.d, p, p).columns, panels + p * size);
      if (summed) add_columns(panels + p * size, number, adds, sums + p * WIDTH<T>);
      for (int64_t q = 0; q <= p; ++q)
        product(panels + p * size, panels + q * size, {&piece, &piece + 1}, part_of<T>(x.d, p, q),
                adds, *tile++);
    }
  }
};

template <class T>
T tall(const Total<T>& total, const Rows<T>& x, bool summed, T* room, int threads) {
  const int64_t count = panels_in<T>(x.d), blocks = (x.number + DEPTH - 1) / DEPTH;
  const Own<T> all(room, x.d, 0);
  T trace = 0;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int t = 0; t < threads; ++t) {
      Own<T> own(room, x.d, t);
      const int64_t begin = blocks * t / threads, end = blocks * (t + 1) / threads;
      for (int64_t b = begin; b < end; ++b)
        own.take(x, b * DEPTH, std::min(DEPTH, x.number - b * DEPTH), b > begin, summed);
    }
#pragma omp for schedule(static, 1) reduction(+ : trace)
    for (int64_t p = 0; p < count; ++p) {
      for (int t = 1; t < threads; ++t) {
        const Own<T> own(room, x.d, t);
        for (int64_t n = tiles_in(p); n < tiles_in(p + 1); ++n) all.tiles[n].add(own.tiles[n]);
        for (int64_t j = p * WIDTH<T>; summed && j < (p + 1) * WIDTH<T>; ++j)
          all.sums[j] += own.sums[j];
      }
      for (int64_t q = 0; q <= p; ++q)
        trace += store(total, p, q, total.adds, all.tiles[tiles_in(p) + q]);
    }
    arrive();
  }
  return trace;
}

template <class T>
bool is_tall(int64_t rows, int64_t d, int threads) {
  const int64_t own = room_for_rows<T>(d) * sizeof(T);
  return rows >= threads * DEPTH && own <= std::min({OWN * rows, MOST, ALL / threads});
}

// Numbers.
template <class T>
int64_t room(int64_t rows, int64_t d, int threads) {
  if (is_tall<T>(rows, d, threads)) return threads * room_for_rows<T>(d);
  return room_for_columns<T>(rows, d);
}

// What columns add up to.
template <class T>
struct Sums {
  T* start;
  bool adds;
};

template <class T>
T gram(const Total<T>& total, const Rows<T>& x, Sums<T> sums, T* room, int threads) {
  const auto take = is_tall<T>(x.number, x.d, threads) ? tall<T> : wide<T>;
  const T trace = take(total, x, sums.start != nullptr, room, threads);
  for (int64_t j = 0; j < (sums.start ? x.d : 0); ++j)  // they come first in the room
    sums.start[j] = sums.adds ? sums.start[j] + room[j] : room[j];
  return trace;
}

}  // namespace
}  // namespace vectors

// The sum of what is on the diagonal: no number, or infinite, if any row has such an entry.
extern "C" Number gram(Number* total, int64_t step, double scale, bool adds, const Number* x,
                       const int64_t* rows, int64_t number, const int64_t* columns, int64_t d,
                       Number* sums, bool adds_sums, Number* room, int threads) {
  return vectors::gram<Number>({total, step, d, Number(scale), adds}, {x, rows, columns, number, d},
                               {sums, adds_sums}, room, threads);
}

extern "C" int64_t gram_room(int64_t rows, int64_t d, int threads) {
  return vectors::room<Number>(rows, d, threads);
}
