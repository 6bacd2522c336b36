package vm

import "fmt"

// Disk is a vhost-user-blk disk of a machine.
type Disk struct {
	Name     string // of QEMU's objects
	Socket   string // of the back-end
	Queues   int    // 1 if 0
	Packed   bool   // packed rings instead of split ones
	NoEvents bool   // no event index: a notification with each batch
}

// Args returns the arguments of QEMU for the disk. A back-end that goes away is looked
// for again each second, the shortest time that QEMU 7.2 knows.
func (d Disk) Args() []string {
	onOff := map[bool]string{true: "on", false: "off"}
	return []string{
		"-chardev", fmt.Sprintf("socket,id=%s-socket,path=%s,reconnect=1", d.Name, d.Socket),
		"-device", fmt.Sprintf("vhost-user-blk-pci,id=%s,chardev=%[1]s-socket,num-queues=%d,packed=%s,event_idx=%s",
			d.Name, max(d.Queues, 1), onOff[d.Packed], onOff[!d.NoEvents]),
	}
}
