// Tiles of a batch of maps, for convolutions that are not depthwise.

// One channel of a map.
struct Sizes {
    int height, width;

    __device__ __forceinline__ long long positions() const { return (long long)height * width; }
};

// Where a tile of High x Wide positions is, in a batch of maps.
template <int High, int Wide>
struct MapTile {
    int batch, top, left;

    __device__ __forceinline__ MapTile(int index, const Sizes& map) {
        const int across = (map.width + Wide - 1) / Wide, down = (map.height + High - 1) / High;
        left = index % across * Wide;
        top = index / across % down * High;
        batch = index / across / down;
    }
};
