package campaign

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/test/campaign/nbdclient"
)

// counter is a volume of which each unit is a counter with one owner: it reads the counter,
// which must be what it made it, and raises it by a write that it sees through. Others write
// beside it: a write that is carried out once more sets a counter back.
type counter struct {
	*disk
	value [countedUnits]uint64
	done  int64
	mu    sync.Mutex // guards done
}

// work raises all counters until stop is closed.
func (c *counter) work(ctx context.Context, stop <-chan struct{}) {
	var wg sync.WaitGroup
	workers := len(c.clients) * c.depth
	for w := range workers {
		wg.Go(func() {
			n := int64(0)
			for u := w; ; u += workers {
				select {
				case <-stop:
					c.mu.Lock()
					c.done += n
					c.mu.Unlock()
					return
				default:
				}
				if err := c.raise(ctx, c.clients[w%len(c.clients)], u%countedUnits); err != nil {
					c.fail(err)
					return
				}
				c.acked.Add(2)
				n += 2
			}
		})
	}
	wg.Wait()
}

// raise proves a counter and raises it.
func (c *counter) raise(ctx context.Context, cl client, u int) error {
	if err := c.prove(ctx, cl, u); err != nil {
		return err
	}
	p := make([]byte, c.unit)
	fill(p, c.id, uint64(u), c.value[u]+1)
	r := &nbdclient.Request{Command: nbdclient.Write, Offset: int64(u * c.unit), Data: p, FUA: c.value[u]%64 == 0}
	if err := cl.Do(ctx, r); err != nil {
		return requestError(r, err)
	}
	c.value[u]++
	return nil
}

func (c *counter) prove(ctx context.Context, cl client, u int) error {
	r := &nbdclient.Request{Command: nbdclient.Read, Offset: int64(u * c.unit), Data: make([]byte, c.unit)}
	if err := cl.Do(ctx, r); err != nil {
		return requestError(r, err)
	}
	got, err := parse(r.Data, c.id, uint64(u))
	if err == nil && got != c.value[u] {
		err = fmt.Errorf("it is %d and was raised to %d", got, c.value[u])
	}
	if err != nil {
		return fmt.Errorf("counter %d: %w (read at %s)", u, err, time.Now().Format(time.StampMicro))
	}
	return nil
}

// settle proves all counters with nothing else in flight.
func (c *counter) settle(ctx context.Context) error {
	for u := range countedUnits {
		if err := c.prove(ctx, c.clients[0], u); err != nil {
			return fmt.Errorf("volume %s: %w", c.name, err)
		}
	}
	return nil
}
