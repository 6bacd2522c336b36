// Package vhost tests front-end and back-end of vhost-user together: what one of Pollux's
// own says of disks, the other must understand.
package vhost
