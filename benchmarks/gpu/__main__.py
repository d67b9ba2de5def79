from benchmarks.gpu.suite import main

main()
