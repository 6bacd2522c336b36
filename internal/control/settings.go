package control

import (
	"context"
	"net/http"
	"net/url"
)

// PoolSettings are those that are kept with a pool.
type PoolSettings struct {
	// DedupIndex is the memory of the pool's index in bytes; 0 is what the settings of
	// the guests say.
	DedupIndex int64 `json:"dedup_index,omitempty"`
	// LLRRMThreshold is the number of places of a block on disks with which it moves to
	// low-latency random read memory when it is received once more; 0 is the default.
	LLRRMThreshold int `json:"llrrm_threshold,omitempty"`
}

// PoolChange changes the settings of a pool; what is nil stays, and 0 is the default.
type PoolChange struct {
	DedupIndex     *int64 `json:"dedup_index,omitempty"`
	LLRRMThreshold *int   `json:"llrrm_threshold,omitempty"`
}

// ChangePool changes the settings that are kept with a pool.
func (c *Client) ChangePool(ctx context.Context, pool string, ch PoolChange) (p Pool, err error) {
	err = c.agent.call(ctx, http.MethodPatch, "/v1/pools/"+url.PathEscape(pool), ch, &p)
	return p, err
}
