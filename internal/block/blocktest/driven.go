package blocktest

import "github.com/pollux-storage/pollux/hpdi"

// driven is a device with a modelled drive below it, which is told what is asked of the
// device in one call: the reads, writes and writes of zeroes that are well formed.
type driven struct {
	hpdi.Device
	rotates   bool
	submitted func(reqs []*hpdi.Request)
}

// Info describes the device, with the drive that is below it.
func (d *driven) Info() hpdi.Info {
	info := d.Device.Info()
	info.Rotates = d.rotates
	return info
}

func (d *driven) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := d.Device.NewQueue(depth)
	if err != nil {
		return nil, err
	}
	return &drivenQueue{Queue: q, d: d}, nil
}

type drivenQueue struct {
	hpdi.Queue
	d     *driven
	moved []*hpdi.Request // of one call
}

func (q *drivenQueue) Submit(reqs ...*hpdi.Request) error {
	info := q.d.Info()
	q.moved = q.moved[:0]
	for _, r := range reqs {
		if r.Op != hpdi.OpFlush && r.Op != hpdi.OpDiscard && r.Bytes() > 0 && r.Check(info) == nil {
			q.moved = append(q.moved, r)
		}
	}
	q.d.submitted(q.moved)
	return q.Queue.Submit(reqs...)
}
