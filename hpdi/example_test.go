package hpdi_test

import (
	"context"
	"fmt"
	"log"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/open"
)

// A device is opened by its URI and read and written by a queue.
func Example() {
	d, err := open.Open(context.Background(), "mem:scratch?size=16MiB")
	if err != nil {
		log.Fatal(err)
	}
	defer d.Close()
	q, err := d.NewQueue(32)
	if err != nil {
		log.Fatal(err)
	}
	defer q.Close()

	mem, err := hpdi.Alloc(8192) // suits every device
	if err != nil {
		log.Fatal(err)
	}
	defer hpdi.Free(mem)
	copy(mem, "written")
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Offset: 4096, Vec: [][]byte{mem[:4096]}}); err != nil {
		log.Fatal(err)
	}
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Offset: 4096, Vec: [][]byte{mem[4096:]}}); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", mem[4096:4103])
	// Output: written
}

// Many requests are in flight, of which each comes back when it is done.
func ExampleQueue() {
	d, err := open.Open(context.Background(), "mem:?size=1MiB")
	if err != nil {
		log.Fatal(err)
	}
	defer d.Close()
	const depth = 16
	q, err := d.NewQueue(depth)
	if err != nil {
		log.Fatal(err)
	}
	defer q.Close()
	mem, err := hpdi.Alloc(depth * 4096)
	if err != nil {
		log.Fatal(err)
	}
	defer hpdi.Free(mem)

	reqs := make([]*hpdi.Request, depth)
	for i := range reqs {
		reqs[i] = &hpdi.Request{Op: hpdi.OpWrite, Offset: int64(i) * 4096, Vec: [][]byte{mem[i*4096:][:4096]}, User: i}
	}
	if err := q.Submit(reqs...); err != nil {
		log.Fatal(err) // the queue itself is broken
	}
	sum := 0
	done := make([]*hpdi.Request, 0, depth)
	for left := depth; left > 0; left -= len(done) {
		if done, err = q.Wait(1, done[:0]); err != nil {
			log.Fatal(err)
		}
		for _, r := range done {
			if r.Err != nil {
				log.Fatal(r.Err)
			}
			sum += r.User.(int)
		}
	}
	fmt.Println(sum)
	// Output: 120
}

// Completions are waited for with epoll, together with whatever else the program waits for.
func ExampleQueue_event() {
	d, err := open.Open(context.Background(), "mem:?size=1MiB")
	if err != nil {
		log.Fatal(err)
	}
	defer d.Close()
	q, err := d.NewQueue(4)
	if err != nil {
		log.Fatal(err)
	}
	defer q.Close()
	poll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		log.Fatal(err)
	}
	defer unix.Close(poll)
	fd := q.Event()
	if err := unix.EpollCtl(poll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)}); err != nil {
		log.Fatal(err)
	}
	if err := q.Submit(&hpdi.Request{Op: hpdi.OpFlush}); err != nil {
		log.Fatal(err)
	}
	var done []*hpdi.Request
	for len(done) == 0 {
		events := make([]unix.EpollEvent, 8)
		if _, err := unix.EpollWait(poll, events, -1); err != nil && err != unix.EINTR {
			log.Fatal(err)
		}
		if done, err = q.Wait(0, done); err != nil {
			log.Fatal(err)
		}
	}
	fmt.Println(done[0].Op, done[0].Err)
	// Output: flush <nil>
}

// Memory is made known once, so that a driver can pin or share it ahead of its use.
func ExampleDevice_register() {
	d, err := open.Open(context.Background(), "mem:?size=1MiB")
	if err != nil {
		log.Fatal(err)
	}
	defer d.Close()
	mem, err := hpdi.Alloc(1 << 20)
	if err != nil {
		log.Fatal(err)
	}
	if err := d.Register(mem); err != nil {
		log.Fatal(err)
	}
	q, err := d.NewQueue(4)
	if err != nil {
		log.Fatal(err)
	}
	err = hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{mem[:65536], mem[1<<19:][:65536]}})
	fmt.Println(err)
	// In this order: nothing in flight, not registered any more, gone.
	_ = q.Close()
	_ = d.Unregister(mem)
	_ = hpdi.Free(mem)
	// Output: <nil>
}

// A request that takes too long ends, where the driver can end it.
func ExampleRequest_deadline() {
	d, err := open.Open(context.Background(), "mem:?size=1MiB")
	if err != nil {
		log.Fatal(err)
	}
	defer d.Close()
	q, err := d.NewQueue(1)
	if err != nil {
		log.Fatal(err)
	}
	defer q.Close()
	r := &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{make([]byte, 4096)}, Deadline: time.Now().Add(-time.Second)}
	fmt.Println(d.Info().Cancel, hpdi.Do(q, r))
	// Output: all read of 4096 bytes at 0: deadline of the request has passed
}

// A program that does one thing after the other needs no queue.
func ExampleBlocking() {
	d, err := open.Open(context.Background(), "mem:?size=1MiB")
	if err != nil {
		log.Fatal(err)
	}
	defer d.Close()
	b, err := hpdi.NewBlocking(d, 4)
	if err != nil {
		log.Fatal(err)
	}
	defer b.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := b.Write(ctx, make([]byte, 8192), 65536); err != nil {
		log.Fatal(err)
	}
	extents, err := b.Status(ctx, 0, d.Info().Size, nil)
	if err != nil {
		log.Fatal(err)
	}
	for _, e := range extents {
		fmt.Println(e.Length, e.State)
	}
	// Output:
	// 65536 hole
	// 8192 data
	// 974848 hole
}

// What a scheme takes, and what a device is, is listed.
func ExampleInfo_List() {
	for _, s := range open.Schemes() {
		if s.Name == "mem" {
			for _, p := range s.Properties {
				fmt.Printf("%s: %s, %s by default. %s.\n", p.Name, p.Range(), p.Default, p.Meaning)
			}
		}
	}
	d, err := open.Open(context.Background(), "mem:?size=1MiB")
	if err != nil {
		log.Fatal(err)
	}
	defer d.Close()
	for _, s := range d.Info().List()[:4] {
		fmt.Printf("%s = %s\n", s.Name, s.Value)
	}
	// Output:
	// size: a size from 4KiB to 64TiB, 64MiB by default. Bytes of memory, a multiple of 4KiB.
	// name = mem
	// driver = mem
	// size = 1MiB
	// block-size = 4KiB
}
