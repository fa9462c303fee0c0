// total = scale * sum of x x^T over rows, or that added: both triangles, of which one is computed.
//
// The columns of x are copied in panels a few vectors wide. A tile is the product of two panels, a
// few of its rows at a time in registers; while it is in the first cache, its numbers go to both of
// their places, whose memory was asked for before the product began. Sizes were found by timing.

namespace {

// Of a vector, and how many rows of a tile are in registers at once: there are 32, or 16 for AVX.
#if defined(__AVX512F__)
constexpr int BYTES = 64, DOWN = 8;
#elif defined(__AVX__)
constexpr int BYTES = 32, DOWN = 4;
#else
constexpr int BYTES = 16, DOWN = 6;
#endif
constexpr int ACROSS = 3;             // vectors: the width of a panel
constexpr int64_t DEPTH = 128;        // rows of x: so many of two panels fit the first cache
constexpr int64_t NEAR = 1 << 19;     // bytes: panels that stay in the second cache

template <class T>
using Vector [[gnu::vector_size(BYTES), gnu::aligned(alignof(T)), gnu::may_alias]] = T;
template <class T>
constexpr int LANES = BYTES / sizeof(T);
template <class T>
constexpr int WIDTH = ACROSS * LANES<T>;

// Of rows, in panels.
template <class T>
int64_t panels_of(const Rows<T>& x) {
  return (x.d + WIDTH<T> - 1) / WIDTH<T>;
}

template <class T>
int width_of(const Rows<T>& x, int64_t panel) {
  return std::min<int64_t>(WIDTH<T>, x.d - panel * WIDTH<T>);
}

template <class T>
void copy(const Rows<T>& x, int64_t first, int64_t number, int64_t panel, T* to) {
  const int n = width_of(x, panel);
  const int64_t* column = x.columns + panel * WIDTH<T>;
  const bool together = adjacent(column, n);
  for (int64_t k = first; k < first + number; ++k, to += WIDTH<T>) {
    const T* from = x.x + x.rows[k];
    if (together && n == WIDTH<T>) {  // of known length
      std::memcpy(to, from + column[0], sizeof(T) * WIDTH<T>);
    } else {
      for (int j = 0; j < n; ++j) to[j] = from[column[j]];
      std::fill(to + n, to + WIDTH<T>, T(0));
    }
  }
}

// A few rows of a tile: its first N vectors of each.
template <class T, int N>
void multiply(const T* left, const T* right, int64_t depth, T* tile) {
  Vector<T> sums[DOWN][N];
  for (int i = 0; i < DOWN; ++i)
    for (int j = 0; j < N; ++j) sums[i][j] = *(Vector<T>*)(tile + i * WIDTH<T> + j * LANES<T>);
  for (int64_t k = 0; k < depth; ++k, left += WIDTH<T>, right += WIDTH<T>) {
    Vector<T> y[N];
    for (int j = 0; j < N; ++j) y[j] = *(const Vector<T>*)(right + j * LANES<T>);
#pragma GCC unroll 8
    for (int i = 0; i < DOWN; ++i)
#pragma GCC unroll 3
      for (int j = 0; j < N; ++j) sums[i][j] += left[i] * y[j];
  }
  for (int i = 0; i < DOWN; ++i)
    for (int j = 0; j < N; ++j) *(Vector<T>*)(tile + i * WIDTH<T> + j * LANES<T>) = sums[i][j];
}

// A tile of the sum, from its two panels.
template <class T>
void product(const T* left, const T* right, int64_t number, bool diagonal, Corner<T> below,
             Corner<T> above, T* tile) {
  static_assert(WIDTH<T> % DOWN == 0);
  std::fill(tile, tile + WIDTH<T> * WIDTH<T>, T(0));
  for (int64_t k = 0; k < number; k += DEPTH, left += DEPTH * WIDTH<T>, right += DEPTH * WIDTH<T>)
    for (int i = 0; i < below.rows; i += DOWN) {
      const int from = i + DOWN * k / number, to = i + DOWN * std::min(k + DEPTH, number) / number;
      below.fetch(from, to), above.fetch(from, to);
      const int columns = diagonal ? std::min(below.columns, i + DOWN) : below.columns;
      const int vectors = (columns + LANES<T> - 1) / LANES<T>;
      const auto rows = vectors == 1   ? multiply<T, 1>
                        : vectors == 2 ? multiply<T, 2>
                                       : multiply<T, 3>;
      rows(left + i, right, std::min(DEPTH, number - k), tile + i * WIDTH<T>);
    }
}

// Add a tile below the diagonal, or put it there first, and what is there above it, too.
template <class T>
void store(T* tile, bool diagonal, T scale, bool first, Corner<T> below, Corner<T> above) {
  for (int i = 0; i < below.rows; ++i)
    for (int j = 0; j < (diagonal ? i + 1 : below.columns); ++j) {
      T &sum = tile[i * WIDTH<T> + j], &entry = below.start[i * below.step + j];
      entry = sum = first ? scale * sum : entry + scale * sum;
    }
  for (int j = 0; j < above.rows; ++j)
    for (int i = diagonal ? j + 1 : 0; i < above.columns; ++i)
      above.start[j * above.step + i] = tile[i * WIDTH<T> + j];
}

// Pairs of panels below the diagonal, ordered so that some left ones meet all right ones in turn.
std::vector<std::pair<int64_t, int64_t>> pairs(int64_t panels, int64_t together) {
  std::vector<std::pair<int64_t, int64_t>> found;
  for (int64_t start = 0; start < panels; start += together) {
    const int64_t end = std::min(start + together, panels);
    for (int64_t q = 0; q < end; ++q)
      for (int64_t p = std::max(start, q); p < end; ++p) found.emplace_back(p, q);
  }
  return found;
}

template <class T>
void gram(Total<T> total, Rows<T> x, int64_t chunk, T* panels, int threads) {
  const int64_t bytes = sizeof(T) * WIDTH<T> * std::min(chunk, x.number);
  const auto tiles = pairs(panels_of(x), std::max<int64_t>(1, NEAR / bytes));
#pragma omp parallel num_threads(threads)
  {
    populate(total, threads);
    for (int64_t first = 0; first < x.number; first += chunk) {
      const int64_t number = std::min(chunk, x.number - first), size = number * WIDTH<T>;
#pragma omp for schedule(static)
      for (int64_t p = 0; p < panels_of(x); ++p) copy(x, first, number, p, panels + p * size);
      alignas(BYTES) T tile[WIDTH<T> * WIDTH<T>];
#pragma omp for schedule(static)
      for (size_t n = 0; n < tiles.size(); ++n) {
        const auto [p, q] = tiles[n];
        const auto below = total.corner(p * WIDTH<T>, q * WIDTH<T>, WIDTH<T>);
        const auto above = total.corner(q * WIDTH<T>, p * WIDTH<T>, WIDTH<T>);
        product(panels + p * size, panels + q * size, number, p == q, below, above, tile);
        store(tile, p == q, total.scale, first == 0 && !total.adds, below, above);
      }
    }
  }
}

}  // namespace

#define FOR_TYPE(name, T)                                                                        \
  extern "C" void name(T* total, int64_t step, double scale, bool adds, const T* x,              \
                       const int64_t* rows, int64_t number, const int64_t* columns, int64_t d,   \
                       T* panels, int64_t chunk, int threads) {                                  \
    gram<T>({total, step, d, T(scale), adds}, {x, rows, columns, number, d}, chunk, panels,      \
            threads);                                                                            \
  }                                                                                              \
  extern "C" int name##_width() { return WIDTH<T>; }

FOR_TYPE(gram_float, float)
FOR_TYPE(gram_double, double)
