// Package vhost speaks the vhost-user protocol, as QEMU's docs/interop/vhost-user.rst
// defines it, from either end: messages with descriptors over a unix socket, the numbers
// of requests and features, and the area in which a back-end keeps what it has in flight,
// so that another one can go on where it ended.
//
// # The other side is a stranger
//
// The size that a header tells is compared with MaxPayload before anything is received
// for it. A message has at most MaxFiles descriptors; those that come with something that
// is not the beginning of a message, or beyond that number, are closed. Whoever receives a
// message takes the descriptors that it expects with [Message.TakeFiles] and closes the
// rest with [Message.CloseFiles], which is right to call for every message.
//
// A payload's parser demands exactly the size that the payload has and keeps no reference
// to the message. What the numbers mean, whether a region is possible or an index exists,
// is for the caller.
package vhost
