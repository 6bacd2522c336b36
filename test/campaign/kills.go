package campaign

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"regexp"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi/vhostuser"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/pair"
)

// Kills kills the guest that serves, so many times, under the disks of machines: its
// requests are in memory that outlives it, and whoever serves next, the partner or the guest
// started again, goes on with them. Each must take effect once. Requests that overlap are in
// flight all the time, and to a machine each has one beginning and one end, so that a write
// that is made twice undoes another one for all to see: a unit that goes back is not
// linearizable, and its counter, which only its owner raises, is not what it was raised to.
func Kills(ctx context.Context, o Options, policy string) (res Result, err error) {
	p, err := pair.New(o.Bin, o.Base, pair.Settings{
		Log: "16MiB", Cache: "32MiB", PoolSize: "1GiB",
		Failover: []string{fmt.Sprintf("hang_timeout: %v", 10*hangTimeout), "heartbeat: 20ms", "restart_delay: 20ms", "restart_max: 50ms", "crash_limit: 1000000", "giveback_delay: -1s"},
		Policies: map[string]string{"a": policy, "b": policy},
	})
	if err != nil {
		return res, err
	}
	k := &kills{campaign: campaign{Options: o, pair: p}, rng: rand.New(rand.NewPCG(o.Seed, 0x6b696c6c))}
	defer func() {
		if err == nil {
			err = p.Remove(context.WithoutCancel(ctx))
			return
		}
		err = fmt.Errorf("seed %d, %s, after %d kills: %w\n%s", o.Seed, policy, res.Rounds, err, p.Logs(40))
		if derr := p.Down(context.WithoutCancel(ctx)); derr != nil {
			err = fmt.Errorf("%w\nand taking the pair down: %w", err, derr)
		}
	}()
	if err := k.begin(ctx); err != nil {
		return res, errors.Join(err, k.close())
	}
	began := time.Now()
	for err == nil && res.Rounds < o.Rounds && (o.Limit == 0 || time.Since(began) < o.Limit) {
		n := min(killsARound, o.Rounds-res.Rounds)
		err = k.round(ctx, uint64(res.Rounds), n)
		res.Rounds += n
		fmt.Fprintf(o.Log, "%4d kills, %6.1fs\n", res.Rounds, time.Since(began).Seconds())
	}
	for _, d := range k.disks {
		res.Requests += d.acked.Load()
	}
	for _, c := range k.counters {
		res.Requests += c.done
	}
	if err = errors.Join(err, k.close()); err != nil {
		return res, err
	}
	if err := k.takenUp(&res); err != nil {
		return res, err
	}
	_, err = p.Check(ctx)
	return res, err
}

const (
	killsARound  = 10 // before everything is read and proved
	machineDepth = 8  // requests of each client in flight
	countedUnits = 64
)

type kills struct {
	campaign
	rng      *rand.Rand
	machines []*machine
	counters []*counter
}

var takenUp = regexp.MustCompile(`taken up" .*again=(\d+) logged=(\d+) unknown=(\d+)`)

// takenUp counts what guests say of requests whose server had died.
func (k *kills) takenUp(res *Result) error {
	for _, m := range takenUp.FindAllStringSubmatch(k.pair.Logs(1<<30), -1) {
		for i, to := range []*int{&res.Again, &res.Logged, &res.Unknown} {
			n, err := strconv.Atoi(m[i+1])
			if err != nil {
				return err
			}
			*to += n
		}
	}
	if res.Unknown > 0 {
		return fmt.Errorf("of %d requests nobody knew whether they had been carried out", res.Unknown)
	}
	// With 64 requests at once all the time there is none at a kill by rare chance only, and
	// none of several that has to be run again.
	if taken := res.Again + res.Logged; taken == 0 || res.Again == 0 && res.Rounds > 2 {
		return fmt.Errorf("of the requests that were in flight at %d kills, %d were in the log and none was run again: machines had nothing to do, or their requests were not taken up", res.Rounds, res.Logged)
	}
	return nil
}

// begin starts the pair, and a machine for each volume.
func (k *kills) begin(ctx context.Context) error {
	if err := k.pair.Up(ctx); err != nil {
		return err
	}
	for i, v := range []struct {
		name        string
		unit, units int
		packed      vhostuser.Choice
	}{{"a4k", 4096, 1024, vhostuser.Off}, {"b512", 512, 1024, vhostuser.On}, {"acount", 4096, countedUnits, vhostuser.On}, {"bcount", 4096, countedUnits, vhostuser.Off}} {
		if _, err := k.pair.Do(ctx, "volume", "create", v.name, "--size", fmt.Sprint(v.unit*v.units), "--guest", v.name[:1]); err != nil {
			return err
		}
		var vol control.Volume
		if err := k.pair.JSON(ctx, &vol, "volume", "show", v.name); err != nil {
			return err
		}
		m, clients, err := newMachine(ctx, vol.VhostUser.Socket, 2, machineDepth, max(maxUnits*v.unit, 256<<10), v.packed)
		if err != nil {
			return err
		}
		k.machines = append(k.machines, m)
		d := &disk{name: v.name, id: uint64(i + 1), unit: v.unit, units: v.units, depth: machineDepth, hot: 12, clients: clients, history: newHistory(v.units)}
		if v.units == countedUnits {
			k.counters = append(k.counters, &counter{disk: d})
		} else {
			k.disks = append(k.disks, d)
		}
	}
	return nil
}

// close ends the machines as one that is shut down ends: with nothing in flight.
func (k *kills) close() (err error) {
	for _, d := range k.disks {
		d.close()
	}
	for _, c := range k.counters {
		c.close()
	}
	for _, m := range k.machines {
		err = errors.Join(err, m.close())
	}
	return err
}

// round kills n times under load, and proves everything.
func (k *kills) round(ctx context.Context, number uint64, n int) error {
	ctx, cancel := context.WithTimeoutCause(ctx, roundLimit, fmt.Errorf("%d kills took longer than %v: %w", n, roundLimit, context.DeadlineExceeded))
	defer cancel()
	stop := make(chan struct{})
	var load sync.WaitGroup
	for _, d := range k.disks {
		load.Go(func() { d.work(ctx, k.Seed+number<<32, stop) })
	}
	for _, c := range k.counters {
		load.Go(func() { c.work(ctx, stop) })
	}
	var err error
	for i := 0; i < n && err == nil; i++ {
		err = k.kill(ctx)
	}
	if err == nil {
		err = k.whole(ctx)
	}
	close(stop)
	load.Wait()
	for _, d := range k.all() {
		err = errors.Join(err, d.failed())
	}
	if err != nil {
		return err
	}
	for _, d := range k.disks {
		if err := d.settle(ctx); err != nil {
			return err
		}
	}
	for _, c := range k.counters {
		if err := c.settle(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (k *kills) all() []*disk {
	all := append([]*disk(nil), k.disks...)
	for _, c := range k.counters {
		all = append(all, c.disk)
	}
	return all
}

// kill ends the guest that serves one of the identities, and waits until all machines get on.
func (k *kills) kill(ctx context.Context) error {
	time.Sleep(time.Duration(k.rng.IntN(60_000)) * time.Microsecond)
	if k.rng.IntN(4) > 0 { // else whoever is left may die before the other is back
		if err := k.whole(ctx); err != nil {
			return err
		}
	}
	of := []string{"a", "b"}[k.rng.IntN(2)]
	var by string
	err := k.pair.Until(ctx, healLimit, func(st control.Status) string {
		if by = pair.Guest(st, of).ServedBy; by == "" {
			return "nobody serves " + of
		}
		return ""
	})
	if err != nil {
		return err
	}
	if h, err := k.pair.HoldGuest(ctx, by); err == nil { // else it has died meanwhile
		err := h.Signal(unix.SIGKILL)
		h.Close()
		if err != nil {
			return err
		}
	}
	for _, d := range k.all() {
		if err := d.progress(ctx, 20); err != nil {
			return err
		}
	}
	return nil
}
