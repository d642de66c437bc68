package netns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// fenceRounds is more hops than any packet here has before it: pod, node, pod, and back.
	fenceRounds = 12
	// fencePatience bounds the wait of one round: far more than the kernel takes on a busy machine.
	fencePatience = 30 * time.Second
)

// Fence returns when every packet that had been sent anywhere in the enclosure has arrived or is gone. Silence before it may be a slow
// machine; silence after it is a packet that was dropped.
//
// A packet that leaves a veth or loopback interface waits in a queue of the CPU that sent it, one for all network namespaces, first in, first
// out (netif_rx, without RPS); where it is forwarded it goes to that queue's end again. So a datagram that comes round by loopback on a CPU
// says that whatever waited there before has gone one hop further; enough rounds on each CPU, and all of it is where it was to go.
func (n *Network) Fence(ctx context.Context) error {
	err := onThread(func() error { // which keeps the CPU to itself, and ends
		var cpus unix.CPUSet
		if err := unix.SchedGetaffinity(0, &cpus); err != nil {
			return err
		}
		socket, err := loopSocket()
		if err != nil {
			return err
		}
		defer func() { _ = unix.Close(socket) }()
		for cpu, left := 0, cpus.Count(); left > 0; cpu++ {
			if !cpus.IsSet(cpu) {
				continue
			}
			left--
			var one unix.CPUSet
			one.Set(cpu)
			if err := unix.SchedSetaffinity(0, &one); err != nil {
				return fmt.Errorf("go to CPU %d: %w", cpu, err)
			}
			for round := range fenceRounds {
				if err := ctx.Err(); err != nil {
					return err
				}
				if err := goRound(socket, uint64(cpu)<<8|uint64(round)); err != nil {
					return fmt.Errorf("on CPU %d: %w", cpu, err)
				}
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("wait for packets that are on their way: %w", err)
	}
	return nil
}

// loopSocket makes a UDP socket of 127.0.0.1 that talks to itself.
func loopSocket() (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	patience := unix.NsecToTimeval(fencePatience.Nanoseconds())
	err = errors.Join(
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &patience),
		unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}),
	)
	var own unix.Sockaddr
	if err == nil {
		own, err = unix.Getsockname(fd)
	}
	if err == nil {
		err = unix.Connect(fd, own)
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// goRound sends a datagram and waits for it to come back.
func goRound(socket int, round uint64) error {
	var out, in [8]byte
	binary.NativeEndian.PutUint64(out[:], round)
	if _, err := unix.Write(socket, out[:]); err != nil {
		return err
	}
	for {
		n, err := unix.Read(socket, in[:])
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n == len(in) && in == out:
			return nil
		}
	}
}

// Overrun counts the packets that the kernel has thrown away since the machine started because too many waited in a CPU's queue: of these
// nobody can say whether they would have arrived. It counts the whole machine's.
func (n *Network) Overrun() (uint64, error) {
	const file = "/proc/net/softnet_stat" // a line for each CPU, in hexadecimal: processed, dropped, …
	text, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	var sum uint64
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			return 0, fmt.Errorf("%s: %q is no line of counters", file, line)
		}
		dropped, err := strconv.ParseUint(fields[1], 16, 64)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", file, err)
		}
		sum += dropped
	}
	return sum, nil
}
