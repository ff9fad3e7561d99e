"""What a survey of machines means (`coordinator.survey`, `isthmus doctor`). Reading order:

facts     what this machine is: versions, GPU, memory, disk, interface
network   the profile that the measured network is
findings  what is wrong, and the mend
page      all of it in words, with the plan that follows
"""
