package hold

import (
	"context"
	"errors"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// A hold comes to work while the pod's apps try to connect without pause: their packets are no answers to what it asks the kernel.
func TestBindUnderFlood(t *testing.T) {
	connect(t)
	c := config()
	c.Rate = 1 << 20
	open(t, c, asker(oddPorts)) // so that there is something to log
	ctx, cancel := context.WithCancel(t.Context())
	var flood sync.WaitGroup
	defer flood.Wait()
	defer cancel()
	flood.Go(func() {
		for ctx.Err() == nil {
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
			if err == nil {
				err = unix.Connect(fd, &unix.SockaddrInet4{Port: 80, Addr: [4]byte{10, 99, 0, 1}})
				_ = unix.Close(fd)
			}
			if err != nil && !errors.Is(err, unix.EINPROGRESS) && !errors.Is(err, unix.ECONNREFUSED) {
				t.Error(err)
				return
			}
		}
	})
	for i := range 30 {
		h, err := Open(c, asker(oddPorts), discard)
		if err != nil {
			t.Fatal(err)
		}
		run, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- h.Run(run) }()
		await(t, "the hold runs", func() bool { return h.Running() || len(ended) > 0 })
		stop()
		err = <-ended
		h.Close()
		if err != nil {
			t.Fatalf("hold %d: %v", i, err)
		}
	}
}
