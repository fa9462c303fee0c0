// total = scale * sum of w w^T over the windows w of images, or that added, from images alone.
//
// Two taps of a window meet where the first one may lie: in boxes of positions, all of whose
// partners are as far away. Many taps share a box. So products come first, of channels at every
// position of a box with those at its partner, and windows are put together of these. Every thread
// takes some images, with sums of its own, or some panels of channels, of all images.

namespace vectors {
namespace {

template <class T>
class Moved {
 public:
  // A row for each position, and a column for each channel.
  Moved(const Plan& plan, const Rows<T>& x)
      : plan(plan),
        x(x),
        channels(x.d),
        panels(channels.panels),
        parts((x.number + plan.rows - 1) / plan.rows),
        size(plan.rows * WIDTH<T>),
        pairs(channels.pairs()) {}

  // Numbers.
  int64_t room(int threads) const {
    if (is_tall(threads)) return threads * room_for_rows();
    return threads * room_for_pair() + parts_together() * panels * size;
  }

  // The trace of the sum.
  T take(const Total<T>& total, T* room, int threads) const {
    const Windows<T> windows(plan, channels, total);
    return is_tall(threads) ? tall(windows, room, threads) : wide(windows, room, threads);
  }

 private:
  const Plan& plan;
  const Rows<T>& x;
  const Channels<T> channels;
  const int64_t panels, parts, size;  // of a panel: numbers
  const std::vector<Pair> pairs;

  int64_t room_for_pair() const { return plan.number * WIDTH<T> * WIDTH<T>; }

  int64_t room_for_rows() const { return pairs.size() * room_for_pair() + panels * size; }

  bool is_tall(int threads) const {
    const int64_t own = room_for_rows() * sizeof(T);
    return parts >= threads && own <= std::min(MOST, ALL / threads);
  }

  // Of which all panels are there at once.
  int64_t parts_together() const {
    const int64_t sum = x.d * plan.taps * x.d * plan.taps, most = std::max(CHUNK, SUMS * sum);
    return std::clamp<int64_t>(most / (panels * size), 1, parts);
  }

  int64_t rows_in(int64_t part) const { return std::min(plan.rows, x.number - part * plan.rows); }

  void copy_panel(int64_t part, int64_t p, T* panel) const {
    copy(x, part * plan.rows, rows_in(part), p * channels.width, channels.in(p), panel);
  }

  // Products of some images' panels in every box, or those added: a few rows of all boxes at a
  // time. Of a panel with itself, half of the boxes: the others turned have the same.
  void multiply(Pair pair, const T* images, int64_t rows, bool adds, Tile<T>* tiles) const {
    const auto [p, q, _] = pair;
    const T *left = images + p * size, *right = images + q * size;
    std::vector<int64_t> next(plan.number);
    for (int64_t b = 0; b < plan.number; ++b) next[b] = plan.boxes[b].begin;
    for (bool rest = true; rest; adds = true) {
      rest = false;
      for (int64_t b = 0; b < plan.number; ++b) {
        const Box& box = plan.boxes[b];
        if (p == q && box.turned < b) continue;
        const Pieces some = pieces(next[b], box.end, rows);
        if (some.begin == some.end && adds) continue;
        const Part part{channels.in(p), channels.in(q), p == q && box.turned == b};
        product(left, right + box.shift * WIDTH<T>, some, part, adds, tiles[b]);
        next[b] += some.end - some.begin;
        rest = true;
      }
    }
  }

  // The next ones, of the first so many rows.
  Pieces pieces(int64_t begin, int64_t end, int64_t rows) const {
    const Piece *first = plan.pieces + begin, *last = first;
    for (int64_t n = 0; last < plan.pieces + end && last->start < rows && n < DEPTH; ++last)
      n += last->length;
    return {first, last};
  }

  T tall(const Windows<T>& windows, T* room, int threads) const {
    const auto tiles_of = [&](int64_t t, Pair pair) {
      return reinterpret_cast<Tile<T>*>(room + t * room_for_rows() + pair.before * room_for_pair());
    };
    T trace = 0;
#pragma omp parallel num_threads(threads)
    {
      populate(windows.total, threads);
#pragma omp for schedule(static)
      for (int t = 0; t < threads; ++t) {
        T* images = room + (t + 1) * room_for_rows() - panels * size;
        const int64_t begin = parts * t / threads, end = parts * (t + 1) / threads;
        for (int64_t part = begin; part < end; ++part) {
          for (int64_t p = 0; p < panels; ++p) copy_panel(part, p, images + p * size);
          for (const Pair& pair : pairs)
            multiply(pair, images, rows_in(part), part > begin, tiles_of(t, pair));
        }
      }
#pragma omp for schedule(dynamic) reduction(+ : trace)
      for (size_t n = 0; n < pairs.size(); ++n) {
        Tile<T>* all = tiles_of(0, pairs[n]);
        for (int t = 1; t < threads; ++t) add(pairs[n], tiles_of(t, pairs[n]), all);
        trace += windows.finish(pairs[n], windows.total.adds, all);
      }
      arrive();
    }
    return trace;
  }

  // Add another thread's sums of two panels.
  void add(Pair pair, const Tile<T>* from, Tile<T>* to) const {
    for (int64_t b = 0; b < plan.number; ++b)
      if (pair.p != pair.q || plan.boxes[b].turned >= b) to[b].add(from[b]);
  }

  T wide(const Windows<T>& windows, T* room, int threads) const {
    T *images = room + threads * room_for_pair(), trace = 0;
#pragma omp parallel num_threads(threads)
    {
      populate(windows.total, threads);
      for (int64_t first = 0; first < parts; first += parts_together()) {
        const int64_t number = std::min(parts_together(), parts - first);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < number * panels; ++n)
          copy_panel(first + n / panels, n % panels, images + n * size);
#pragma omp for schedule(static) reduction(+ : trace)
        for (int t = 0; t < threads; ++t) {
          Tile<T>* tiles = reinterpret_cast<Tile<T>*>(room + t * room_for_pair());
          for (const Pair& pair : pairs) {
            // Of two different panels there are twice as many products.
            const int64_t work = 2 * pair.before - pair.p;
            if (work * threads / (panels * panels) != t) continue;
            for (int64_t n = 0; n < number; ++n)
              multiply(pair, images + n * panels * size, rows_in(first + n), n > 0, tiles);
            const T found = windows.finish(pair, windows.total.adds || first > 0, tiles);
            if (first + number == parts) trace += found;
          }
        }
      }
      arrive();
    }
    return trace;
  }
};

}  // namespace
}  // namespace vectors

// The sum of what is on the diagonal: no number, or infinite, if any window has such an entry.
extern "C" Number moved(Number* total, int64_t step, double scale, bool adds, const Number* x,
                        const int64_t* rows, int64_t number, const int64_t* columns, int64_t d,
                        const vectors::Plan* plan, Number* room, int threads) {
  const Rows<Number> images{x, rows, columns, number, d};
  const Total<Number> sum{total, step, d * plan->taps, Number(scale), adds};
  return vectors::Moved<Number>(*plan, images).take(sum, room, threads);
}

extern "C" int64_t moved_room(int64_t number, int64_t d, const vectors::Plan* plan, int threads) {
  return vectors::Moved<Number>(*plan, {nullptr, nullptr, nullptr, number, d}).room(threads);
}
